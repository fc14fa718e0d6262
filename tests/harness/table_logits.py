"""Megatron's models of tables, and their logits with the weights that a table makes: a script.

Standard input has ``[[case, layout, folder], ...]`` as JSON. Each model is built from the table's
flags, filled tensor by tensor without a checkpoint, and run on ``tokens.pt`` of the folder;
``<layout>.pt`` there gets its logits ``[b, s, v]``. Nothing of ``import-hf`` but its names is used.
Without a folder a model is built alone. The output is that of ``stored_keys.py``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_moe_inject.convert.architectures import architecture_of
from megatron_moe_inject.convert.arguments import option_words
from megatron_moe_inject.convert.naming import pieces_of
from tests.harness import stored_keys
from tests.harness.logits_gpt import logits
from tests.harness.table_keys import ROWS, megatrons, name_of
from tests.harness.tiny_folders import config_of


def weights(case: str, layout: str, folder: Path) -> dict[str, dict[tuple, torch.Tensor]]:
    """By each name of a stored tensor, its slices by their place on the leading axes."""
    tensors = load_file(folder / "model.safetensors")
    config = config_of(case)
    _, naming = megatrons(case, layout)
    slices: dict[str, dict[tuple, torch.Tensor]] = {}
    for entry in architecture_of(config).entries(config):
        whole = entry.form.join([tensors[part.name][part.index] for part in entry.parts])
        if entry.padded:
            whole = torch.nn.functional.pad(whole, (0, 0, 0, ROWS - len(whole)))
        where = naming.stored(entry.slot)
        for piece, rows in pieces_of(entry, where):
            for name in piece.names:
                slices.setdefault(name, {})[where.place] = whole[rows]
    return slices


def fill(chunk: torch.nn.Module, slices: dict[str, dict[tuple, torch.Tensor]]) -> None:
    """Write the slices into the model's parameters."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    for shard in stored_keys.sharded_values(chunk):
        if not isinstance(shard, ShardedTensor):
            continue
        axes = shard.prepend_axis_num
        whole = slices[shard.key][tuple(shard.global_offset[:axes])]
        offsets = shard.global_offset[axes:]
        rows = (slice(o, o + n) for o, n in zip(offsets, shard.local_shape, strict=True))
        shard.data.copy_(whole[tuple(rows)])


def main() -> None:
    models = json.load(sys.stdin)
    stored_keys.begin()
    results = {}
    for case, layout, folder in models:
        chunk = stored_keys.built(option_words(megatrons(case, layout)[0]))
        results[name_of(case, layout)] = stored_keys.stored(chunk)
        if folder is not None:
            with torch.no_grad():
                fill(chunk, weights(case, layout, Path(folder)))
            out = logits(chunk, torch.load(Path(folder) / "tokens.pt"))
            torch.save(out[..., : config_of(case).vocab_size], Path(folder) / f"{layout}.pt")
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
