"""``rearrange`` and ``repeat`` of the package ``einops``, for Megatron's layers where it is absent.

A pattern names the axes of a tensor and of the result, ``b l (h p) -> l b h p``: axes in brackets
are one axis of the tensor, ``1`` is an axis of size one. An axis that only the result names is
repeated.
"""

from __future__ import annotations

import math
import re

import torch


def _groups(side: str) -> list[list[str]]:
    """The axes of one side, each as the names in it; none in an axis of size one."""
    groups = [inner.split() or [name] for inner, name in re.findall(r"\(([^)]*)\)|(\S+)", side)]
    return [[name for name in group if name != "1"] for group in groups]


def rearrange(tensor: torch.Tensor, pattern: str, **sizes: int) -> torch.Tensor:
    """``tensor`` with its axes split, moved, joined and repeated as ``pattern`` says.

    Args:
        pattern: axes of ``tensor``, an arrow, axes of the result.
        sizes: of axes by name; one name in each pair of brackets may be left out.

    Raises:
        ValueError: the pattern has more or fewer axes than the tensor.
    """
    before, after = (_groups(side) for side in pattern.split("->"))
    for size, group in zip(tensor.shape, before, strict=True):
        open_names = [name for name in group if name not in sizes]
        if open_names:
            (name,) = open_names
            sizes[name] = size // math.prod(sizes[other] for other in group if other != name)
    names = [name for group in before for name in group]
    wanted = [name for group in after for name in group]
    split = tensor.reshape([sizes[name] for name in names])
    moved = split.permute([names.index(name) for name in wanted if name in names])
    for position, name in enumerate(wanted):
        if name not in names:
            moved = moved.unsqueeze(position)
    whole = moved.expand([sizes[name] for name in wanted])
    return whole.reshape([math.prod(sizes[name] for name in group) for group in after])
