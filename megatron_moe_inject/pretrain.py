"""Pretraining of a GPT or hybrid model where there is no Megatron checkout, only the wheel.

    python -m megatron_moe_inject.pretrain [--cpu] <Megatron flags> [--inject-...]

Wheels ship Megatron's training loop but no training script. This one feeds the loop what a
script must (``gpt_entry``, ``data/batches``). It computes what NVIDIA's ``pretrain_gpt.py``, or
with ``--hybrid-layer-pattern`` ``pretrain_hybrid.py``, computes on the same flags, bit for bit;
supervised fine-tuning, fill-in-the-middle and ModelOpt stay with these scripts. Nothing heavy is
imported here: checkpoint savers import the main module again in a process of their own.
"""

from megatron_moe_inject import launch


def main() -> None:
    """Put the plugin in, then train."""
    launch.prepare()
    launch.require_device()
    from megatron_moe_inject.host import gpt_entry

    gpt_entry.main()


if __name__ == "__main__":
    main()
