"""Whole tensors of a saved checkpoint."""

import torch

from megatron_moe_inject.host.torch_dist import Piece

SAVE = ("--save-interval", "100", "--save")


def whole(checkpoint, name):
    stored = checkpoint.tensors[name]
    target = torch.empty(stored.size, dtype=stored.properties.dtype)
    checkpoint.read([Piece(name, tuple(stored.size), (0,) * len(stored.size), target)])
    return target
