"""A plain loop over the validation data: what a model's logits are, with nothing of the plugin.

Run by ``lane.run`` as a script. Keeps the logits, labels, tokens and masks of every micro-batch
that Megatron evaluates on in the file that PLAIN_LOGITS names.
"""

import os

import torch


def main() -> None:
    from megatron.core.utils import get_model_config

    from megatron_moe_inject.host import gpt_entry
    from megatron_moe_inject.host.batches import get_batch

    kept = []

    def forward_step(data_iterator, model):
        batch = get_batch(data_iterator, get_model_config(model))
        logits = model(batch.tokens, batch.position_ids, batch.attention_mask)

        def loss_func(output):
            kept.append(
                {
                    "logits": output.detach().clone(),
                    "tokens": batch.tokens.clone(),
                    "labels": batch.labels.clone(),
                    "loss_mask": batch.loss_mask.clone(),
                }
            )
            zero = output.new_zeros(1)
            return zero.sum(), torch.ones((), dtype=torch.int), {"lm loss": torch.ones(2)}

        return logits, loss_func

    gpt_entry.forward_step = forward_step
    gpt_entry.main()
    whole = {name: torch.cat([part[name] for part in kept]) for name in kept[0]}
    torch.save(whole, os.environ["PLAIN_LOGITS"])


if __name__ == "__main__":
    main()
