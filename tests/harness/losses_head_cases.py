"""Heads of which some rows have values of their own, or with a correction of low rank, for tests.

Shapes: h hidden, v vocabulary, n ids with values of their own, r rank of a correction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_moe_inject.losses import HeadRows, LowRankHead
from tests.harness.losses_cases import FusedCase

CHANGES = ("rows", "low rank", "both")
IDS = (1, 2, 7, 11, 13, 16, 17, 20)  # of V = 24, the last two beyond VALID = 17
SCALE = 2.5


@dataclass
class ChangedHead:
    """All that changes the head of a case, whole; None where there is no such change."""

    ids: Tensor | None = None
    values: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None

    @classmethod
    def make(cls, case: FusedCase, change: str = "rows", ids=IDS, rank=3, scale=1.0) -> ChangedHead:
        """Of the case's width and dtype, ``scale`` being the size of its numbers."""
        generator, (v, h) = torch.Generator().manual_seed(17), case.weight.shape

        def normal(*shape):
            made = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return (made * scale).to(case.weight.dtype)

        changed = cls()
        if change in ("rows", "both"):
            changed.ids, changed.values = torch.tensor(ids, dtype=torch.int64), normal(len(ids), h)
        if change in ("low rank", "both"):
            changed.a, changed.b = normal(rank, h), normal(v, rank)
        return changed

    def applied(self, case: FusedCase) -> FusedCase:
        """The case with the head that they make, in float64."""
        weight = case.weight.double()
        if self.values is not None:
            weight = weight.index_copy(0, self.ids, self.values.double())
        if self.a is not None:
            weight = weight + SCALE * self.b.double() @ self.a.double()
        return replace(case, weight=weight)

    def gradients(self, of_head: Tensor) -> dict[str, Tensor]:
        """Of all that there is, whole, by the gradient of the head that they make [v, h]."""
        found = {}
        if self.values is not None:
            found["values"] = of_head[self.ids]
        if self.a is not None:
            found["a"] = SCALE * self.b.double().t() @ of_head
            found["b"] = SCALE * of_head @ self.a.double().t()
        return found

    def shard(self, rank: int, size: int, v: int, trains: bool = True) -> ShardOfChanges:
        """Leaves of a rank's part."""
        width = v // size
        rows = low_rank = where = None
        if self.values is not None:
            where = (self.ids // width == rank).nonzero().flatten()
            values = self.values[where].clone().requires_grad_(trains)
            rows = HeadRows(self.ids[where] - rank * width, values)
        if self.a is not None:
            a = self.a.clone().requires_grad_(trains)
            b = self.b[rank * width : (rank + 1) * width].clone().requires_grad_(trains)
            low_rank = LowRankHead(a, b, SCALE)
        return ShardOfChanges(rows, low_rank, where, slice(rank * width, (rank + 1) * width))


@dataclass
class ShardOfChanges:
    """A rank's part: leaves, and which of the whole's rows they are."""

    head_rows: HeadRows | None
    head_low_rank: LowRankHead | None
    where: Tensor | None
    ids: slice

    @property
    def options(self) -> dict[str, HeadRows | LowRankHead]:
        """What ``FusedCase.call`` is told."""
        given = {"head_rows": self.head_rows, "head_low_rank": self.head_low_rank}
        return {name: change for name, change in given.items() if change is not None}

    @property
    def leaves(self) -> dict[str, Tensor]:
        found = {}
        if self.head_rows is not None:
            found["values"] = self.head_rows.values
        if self.head_low_rank is not None:
            found |= {"a": self.head_low_rank.a, "b": self.head_low_rank.b}
        return found

    def cut(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of whole gradients; ``a`` is whole on every rank."""
        rows = {"values": self.where, "a": slice(None), "b": self.ids}
        return {name: gradient[rows[name]] for name, gradient in whole.items()}
