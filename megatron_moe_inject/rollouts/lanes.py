"""The data-parallel ranks of a step, and an order of its samples that does not depend on them.

Shapes: d data-parallel ranks, n micro-batches of each, b samples of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_moe_inject.data.apportion import dealt
from megatron_moe_inject.data.section import scheduled
from megatron_moe_inject.host.agreement import host_twin
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext


@dataclass(frozen=True)
class Lanes:
    """How a batch is dealt to data-parallel ranks.

    Attributes:
        group: their gloo group; None for one rank.
        size, rank: how many, and which one this is.
        spread: whether the order of the training data is dealt in stretches (``data.apportion``).
    """

    group: dist.ProcessGroup | None
    size: int
    rank: int
    spread: bool

    @classmethod
    def of(cls, student: BuiltStudent, run: RunContext) -> Lanes:
        """Of this rank. Collectives: those of ``host_twin``."""
        group = student.groups.dp
        return cls(host_twin(group), group.size(), group.rank(), scheduled(run.recipe))

    def gather(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels ``[d, n, b]`` of all d ranks.

        Collectives: one all-gather of n*b int64 over the data-parallel ranks.
        """
        if self.group is None:
            return labels[None]
        every = [torch.empty_like(labels) for _ in range(self.size)]
        dist.all_gather(every, labels.contiguous(), group=self.group)
        return torch.stack(every)

    def ordered(self, labels: torch.Tensor, wanted: int) -> list[tuple[int, int, int]]:
        """Where a domain's samples stand, (rank, micro-batch, sample), in an order that is the same
        for any number of ranks.

        Args:
            labels: ``[d, n, b]``.
            wanted: the domain's.
        """
        ranks, _, samples = labels.shape
        total = labels.numel()

        def position(place: list[int]) -> int:
            rank, micro_batch, sample = place
            at = (micro_batch * ranks + rank) * samples + sample
            return dealt(at, total, samples, ranks) if self.spread else at

        places = (labels == wanted).nonzero().tolist()
        return [(rank, n, b) for rank, n, b in sorted(places, key=position)]
