"""Our GPT entry; at its end every rank prints the bytes that it holds, by what holds them.

``allocated: {"rank": ..., "parameters": ..., "gradients": ..., "optimizer": ..., "originals": ...,
"saved": [...]}``: what parameters and buffers take, Megatron's gradient buffers, what its
optimizer keeps after a step besides parameters (its own float32 values and the moments, steps
aside), the plugin's copies of the start, and for each model chunk what autograd saved in its first
forward pass that trains, each storage once.
"""

import functools
import json
import os

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel

from megatron_moe_inject.host import compat, gpt_entry
from tests.harness.built_model import built, keep_what_is_built, originals

saved = {}


def count_saved(kind):
    stock = kind.forward

    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        if not (self.training and torch.is_grad_enabled()) or self in saved:
            return stock(self, *args, **kwargs)
        storages = {}
        known = {p.untyped_storage().data_ptr() for p in (*self.parameters(), *self.buffers())}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = stock(self, *args, **kwargs)
        saved[self] = sum(storage.nbytes() for storage in storages.values())
        return result

    kind.forward = forward


def storage_bytes(tensors):
    """Of all storages behind tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def optimizer_bytes(optimizer):
    """Of float32 values of its own, and of moments."""
    total = 0
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(inner, "optimizer", None) is None:
            continue
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                state = inner.optimizer.state.get(parameter, {})
                total += sum(value.nbytes for name, value in state.items() if name != "step")
        groups = (
            *getattr(inner, "shard_fp32_from_float16_groups", ()),
            *getattr(inner, "fp32_from_float16_groups", ()),
        )
        total += sum(value.nbytes for group in groups for value in group if value is not None)
    return total


if __name__ == "__main__":
    keep_what_is_built()
    for model in (GPTModel, HybridModel):
        count_saved(model)
    gpt_entry.main()
    chunks = compat.bare_chunks(built[0])
    gradients = [b.grad_data for c in built[0] for b in (*c.buffers, *c.expert_parallel_buffers)]
    held = [t for chunk in chunks for t in (*chunk.parameters(), *chunk.buffers())]
    print(
        "allocated: "
        + json.dumps(
            {
                "rank": int(os.environ["RANK"]),
                "parameters": storage_bytes(held),
                "gradients": storage_bytes(gradients),
                "optimizer": optimizer_bytes(built[1]),
                "originals": sum(each.bytes for each in originals),
                "saved": [saved.get(chunk, 0) for chunk in chunks],
            }
        ),
        flush=True,
    )
