"""How tensors of a Hugging Face folder make up one tensor of Megatron's, and back.

A form is pure index arithmetic on whole tensors of one layer (and one expert): no rounding, any
type, the meta device as well. ``split(join(parts))`` and ``join(split(whole))`` give back what went
in, bit for bit; but for ``Scaled``, for slices that follow from others (``Entry.follows``).

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

    def outputs(self, rows: torch.Tensor) -> list[torch.Tensor] | None:
        """What stands for each of Megatron's outputs, ``[out, ...]``, in the order of the outputs
        of the folder's tensors; ``None`` where these are no linear layers of the same outputs. So
        a low-rank change of Megatron's matrix becomes one of each of the folder's."""
        ...


@dataclass(frozen=True)
class Same:
    """The same tensor on both sides."""

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        (only,) = parts
        return only

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return [whole]

    def outputs(self, rows: torch.Tensor) -> list[torch.Tensor] | None:
        return self.split(rows)


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

    def outputs(self, rows: torch.Tensor) -> list[torch.Tensor] | None:
        return self.split(rows)


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

    def outputs(self, rows: torch.Tensor) -> list[torch.Tensor] | None:
        return self.split(rows)


@dataclass(frozen=True)
class Transposed:
    """A matrix that the folder keeps with its input first, ``[f, h]`` for ``[h, f]``."""

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        (only,) = parts
        return only.t().contiguous()

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return [whole.t().contiguous()]

    def outputs(self, rows: torch.Tensor) -> list[torch.Tensor] | None:
        return [rows]


@dataclass(frozen=True)
class GateUpInTurn:
    """Gate and up whose outputs stand in turn on the folder's last axis, gate first.

    The folder has ``[h, 2 f]``, or ``[2 f]`` of a bias; Megatron gate over up, ``[2 f, h]``.
    """

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        (only,) = parts
        rows = only.t() if only.dim() == 2 else only
        return torch.cat([rows[::2], rows[1::2]])

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        rows = torch.stack(whole.chunk(2), dim=1).flatten(0, 1)
        return [rows.t().contiguous() if rows.dim() == 2 else rows]

    def outputs(self, rows: torch.Tensor) -> list[torch.Tensor] | None:
        return [torch.stack(rows.chunk(2), dim=1).flatten(0, 1)]


@dataclass(frozen=True)
class Scaled:
    """The folder's tensor times a constant, which is rounded to its type, as is the product."""

    by: float

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        (only,) = parts
        return only * torch.tensor(self.by, dtype=only.dtype)

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return [whole / torch.tensor(self.by, dtype=whole.dtype)]

    def outputs(self, rows: torch.Tensor) -> list[torch.Tensor] | None:
        return None
