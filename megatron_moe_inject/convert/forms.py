"""How tensors of a Hugging Face folder make up one tensor of Megatron's, and back.

A form is pure index arithmetic on whole tensors of one layer (and one expert): no rounding, any
type, the meta device as well. ``split(join(parts))`` and ``join(split(whole))`` give back what went
in, bit for bit, but for ``Shifted``, which adds a constant.

Shapes: h hidden, f width of a feed-forward, d head width, g groups of keys and values, q queries of
a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class Form(Protocol):
    """One way to put tensors together."""

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Megatron's tensor of the folder's."""
        ...

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """The folder's tensors of Megatron's."""
        ...


@dataclass(frozen=True)
class Same:
    """The same tensor on both sides."""

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        (only,) = parts
        return only

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return [whole]


@dataclass(frozen=True)
class Stacked:
    """Tensors above each other on their first axis, such as gate ``[f, h]`` over up ``[f, h]``.

    Attributes:
        rows: of each.
    """

    rows: tuple[int, ...]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(parts))

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return list(whole.split(self.rows))


@dataclass(frozen=True)
class Qkv:
    """Queries, keys and values, which Megatron interleaves by group: ``[g, (q + 2) d, ...]``.

    Weights ``[g q d, h]``, ``[g d, h]``, ``[g d, h]``, or biases without the last axis.
    """

    groups: int
    queries: int
    width: int

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        grouped = [part.unflatten(0, (self.groups, -1)) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        grouped = whole.unflatten(0, (self.groups, -1))
        rows = (self.queries * self.width, self.width, self.width)
        return [part.flatten(0, 1) for part in grouped.split(rows, dim=1)]


@dataclass(frozen=True)
class Shifted:
    """A norm's weight that the folder keeps less ``by`` (Gemma: 1 + weight)."""

    by: float = 1.0

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        (only,) = parts
        return only + self.by

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return [whole - self.by]
