"""Logits of checkpoints in Megatron's models, built and run in one process: a script.

Standard input has ``[[flags, checkpoint, tokens, output], ...]`` as JSON. Each model is built from
the flags, filled from the checkpoint as Megatron asks for it, and run on the file of tokens ``[b,
s]``; the output file gets its logits ``[b, s, v]``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.torch_dist import Piece, TorchDistCheckpoint
from tests.harness import stored_keys
from tests.harness.logits_gpt import logits


def fill(chunk: torch.nn.Module, checkpoint: TorchDistCheckpoint) -> None:
    """Read every tensor that the model stores from where it asks for it."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    for shard in stored_keys.sharded_values(chunk):
        if not isinstance(shard, ShardedTensor):
            continue
        stored = checkpoint.tensors[shard.key]
        assert tuple(stored.size) == tuple(shard.global_shape), shard.key
        axes = (1,) * shard.prepend_axis_num
        value = torch.empty((*axes, *shard.local_shape), dtype=stored.properties.dtype)
        place = Piece(shard.key, tuple(stored.size), tuple(shard.global_offset), value)
        checkpoint.read([place])
        shard.data.copy_(value.view(shard.local_shape))


def main() -> None:
    models = json.load(sys.stdin)
    stored_keys.begin()
    for flags, folder, tokens, output in models:
        chunk = stored_keys.built(flags)
        with torch.no_grad():
            fill(chunk, CheckpointPlace("CKPT", Path(folder)).open())
            torch.save(logits(chunk, torch.load(tokens)), output)


if __name__ == "__main__":
    main()
