"""Megatron's pipeline schedules as lists of passes: what is kept at once, how long a step takes.

1F1B and its interleaved form in the order of ``megatron.core.pipeline_parallel.schedules``. A rank
with ``v`` chunks has ``v`` stages; stage ``c * P + r`` is chunk ``c`` of pipeline rank ``r`` of P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_moe_inject.planning.costs import ChunkCost


class Pass(NamedTuple):
    """One pass of a micro-batch through one chunk."""

    forward: bool
    chunk: int
    micro_batch: int


@dataclass(frozen=True)
class Schedule:
    """Sizes of a schedule.

    Attributes:
        micro_batches: of a step, on each pipeline.
        stages: pipeline ranks.
        chunks: of each.
        group: micro-batches that an interleaved schedule runs through a chunk at a time.
        ahead: forwards that a rank runs earlier than it must (``--overlap-moe-expert-...``).
    """

    micro_batches: int
    stages: int = 1
    chunks: int = 1
    group: int = 1
    ahead: int = 0

    def passes(self, rank: int) -> list[Pass]:
        """What pipeline rank ``rank`` runs in a step that trains, in order."""
        order = self._order()
        total = len(order)
        if self.chunks > 1:
            warm = (self.stages - rank - 1) * 2 + (self.chunks - 1) * self.group + self.ahead
        else:
            warm = self.stages - rank - 1
        warm = min(warm, total)
        forwards = [Pass(True, chunk, mb) for mb, chunk in order]
        backwards = [Pass(False, self.chunks - 1 - chunk, mb) for mb, chunk in order]
        steady = [
            each
            for pair in zip(forwards[warm:], backwards[: total - warm], strict=True)
            for each in pair
        ]
        return [*forwards[:warm], *steady, *backwards[total - warm :]]

    def _order(self) -> list[tuple[int, int]]:
        """Micro-batch and chunk of each forward pass, as ``get_schedule_table`` gives them."""
        if self.chunks == 1:
            return [(mb, 0) for mb in range(self.micro_batches)]
        order = []
        for first in range(0, self.micro_batches, self.group):
            batches = range(first, min(first + self.group, self.micro_batches))
            order += [(mb, chunk) for chunk in range(self.chunks) for mb in batches]
        return order

    def most_held(self, rank: int, costs: Sequence[ChunkCost]) -> int:
        """The most bytes that a rank's micro-batches hold at once in a step.

        Args:
            costs: of each of its chunks.
        """
        held = most = 0
        for forward, chunk, _ in self.passes(rank):
            cost = costs[chunk]
            if forward:
                most = max(most, held + cost.forward_peak)
                held += cost.kept
            else:
                held -= cost.kept
                most = max(most, held + cost.backward_peak)
        return most

    def makespan(
        self,
        seconds: Sequence[Sequence[tuple[float, float]]],
        ready: Sequence[float] = (),
    ) -> float:
        """Seconds from the step's begin until the last pass ends; transfers take none.

        Args:
            seconds: of a forward and a backward pass, by pipeline rank and chunk.
            ready: when each pipeline rank can begin; all at once without.
        """
        lists = [self.passes(rank) for rank in range(self.stages)]
        clock = list(ready) or [0.0] * self.stages
        at = [0] * self.stages
        done: dict[tuple[bool, int, int], float] = {}
        last = self.stages * self.chunks - 1
        moved = True
        while moved:
            moved = False
            for rank, passes in enumerate(lists):
                while at[rank] < len(passes):
                    forward, chunk, mb = passes[at[rank]]
                    stage = chunk * self.stages + rank
                    before = stage - 1 if forward else stage + 1
                    needed: float | None = 0.0
                    if 0 <= before <= last:
                        needed = done.get((forward, before, mb))
                    elif not forward:
                        needed = done.get((True, stage, mb))
                    if needed is None:
                        break
                    clock[rank] = max(clock[rank], needed) + seconds[rank][chunk][not forward]
                    done[forward, stage, mb] = clock[rank]
                    at[rank] += 1
                    moved = True
        assert all(n == len(passes) for n, passes in zip(at, lists, strict=True)), "a pass waits"
        return max(clock)

    def busy(self, seconds: Sequence[Sequence[tuple[float, float]]]) -> list[float]:
        """Seconds that each pipeline rank computes in a step."""
        return [self.micro_batches * sum(f + b for f, b in chunks) for chunks in seconds]
