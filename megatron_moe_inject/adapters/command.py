"""``moe-inject merge-adapters``, ``export-adapters`` and ``check-adapters``.

torch is imported when one of them runs: the other commands do without it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_moe_inject.host.commands import Commands, add_command, progress_bar
from megatron_moe_inject.host.domain_choice import add_choice, choice_of
from megatron_moe_inject.host.text import memory_text

_FORMATS = ("peft", "vllm", "sglang")
_EXAMPLES = """examples:
  moe-inject export-adapters ckpt/adapted --hf Qwen3-30B-A3B --output adapters/code
  moe-inject export-adapters ckpt/adapted --hf Qwen3-30B-A3B --output adapters/vllm --format vllm
  moe-inject export-adapters ckpt/adapted --hf Qwen3-30B-A3B --output adapters/code --domain code
  moe-inject check-adapters adapters/code --hf Qwen3-30B-A3B
"""


def add_commands(commands: Commands) -> None:
    """Add the commands to ``moe-inject``; ``run`` of the parsed options returns the text."""
    merge = add_command(
        commands,
        "merge-adapters",
        "write a stock checkpoint with adapters in its weights",
        "Write a checkpoint with adapters and vocabulary rows as one whose weights have them: "
        "W + s B A, rounded once to the type that W is stored in. It holds weights and no "
        "optimizer state: load it with --finetune. Prints what the rounding cost.",
        run=_merge,
    )
    merge.add_argument(
        "--trained", metavar="CKPT", type=Path, required=True, help="the checkpoint with adapters"
    )
    merge.add_argument("--output", type=Path, required=True, help="a --save directory to write")
    add_choice(merge)
    export = add_command(
        commands,
        "export-adapters",
        "write adapters as a folder that PEFT, vLLM or SGLang loads",
        "Write the adapters of a checkpoint as adapter_model.safetensors and adapter_config.json, "
        "by the names of the model's Hugging Face folder, and base.json, which names that folder "
        "by checksum. What the consumer would not load is an error.",
        _EXAMPLES,
        run=_export,
    )
    export.add_argument(
        "checkpoint", metavar="CKPT", type=Path, help="a --save directory or an iteration in it"
    )
    export.add_argument("--hf", type=Path, required=True, help="the folder it was imported from")
    export.add_argument("--output", type=Path, required=True, help="a folder to write")
    export.add_argument(
        "--format", choices=_FORMATS, default="peft",
        help="whose names: PEFT on transformers 5 (default), vLLM, or SGLang",
    )  # fmt: skip
    add_choice(export, weighs=False)
    check = add_command(
        commands,
        "check-adapters",
        "see whether adapters belong to a model",
        "Compare a folder of export-adapters with a Hugging Face folder by checksum. Reads all "
        "weights of the model.",
        run=_check,
    )
    check.add_argument("adapters", metavar="DIR", type=Path, help="a folder of export-adapters")
    check.add_argument("--hf", type=Path, required=True, help="the folder of the model")


def _export(options: argparse.Namespace) -> str:
    from megatron_moe_inject.adapters.export import export_adapters
    from megatron_moe_inject.convert.folder_model import FolderModel
    from megatron_moe_inject.convert.hf_folder import HfFolder
    from megatron_moe_inject.host.checkpoint_place import CheckpointPlace

    done = export_adapters(
        CheckpointPlace("CKPT", options.checkpoint),
        FolderModel.of(HfFolder.open("--hf", options.hf)),
        options.output,
        options.format,
        progress_bar,
        choice_of(options),
    )
    ranks = sorted({done.config["r"], *done.config["rank_pattern"].values()})
    return "\n".join(
        [
            f"{options.output}: adapters of {done.matrices} matrices and {done.rows} rows of the "
            f"vocabulary as {done.tensors} tensors, {memory_text(done.bytes)}, for "
            f"{options.format}",
            f"ranks of modules: {', '.join(map(str, ranks))}",
            f"they belong to {options.hf}, sha256 {done.base.sha256[:12]}",
        ]
    )


def _check(options: argparse.Namespace) -> str:
    from megatron_moe_inject.adapters.adapter_folder import check_base
    from megatron_moe_inject.convert.hf_folder import HfFolder

    base = check_base(options.adapters, HfFolder.open("--hf", options.hf), progress_bar)
    return f"{options.adapters} belongs to {options.hf}, sha256 {base.sha256[:12]}"


def _merge(options: argparse.Namespace) -> str:
    from megatron_moe_inject.adapters.merge import merge_adapters
    from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
    from megatron_moe_inject.host.low_rank import rounding_table

    trained = CheckpointPlace("--trained", options.trained)
    done = merge_adapters(trained, options.output, progress_bar, choice_of(options))
    number = sum(rounding.matrices for rounding in done.roundings.values())
    return "\n".join(
        [
            *rounding_table(done.roundings),
            f"{options.output}: adapters merged into {number} matrices, without optimizer state",
        ]
    )
