"""How a step's teacher work is divided among the stages of a pipeline, before the schedule.

A stage waits for its first micro-batch: stage i for the forwards of the i stages before it. In that
time it can run a teacher at no cost, so later stages take more. Shares are filled like water: each
pass goes to the stage that would be free to begin the schedule first.

Which sequences go through the teacher together depends on their number, their length and the
number of stages, and on no clock. So what a teacher says is the same, bit for bit, whatever the
shares are: who runs a pass changes nothing in it.

Pure maths, without torch.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

MAX_SEQUENCES = 4
"""Sequences of one pass through a teacher, at most, which bounds its activations."""
PASS_TOKENS = 4096
"""Tokens that fill a GPU in one pass: more sequences than these hold are no faster together."""
UNKNOWN = math.inf
"""Ratio before it is measured: as if no stage waited, so that shares are even."""


def shares(
    count: int, stages: int, ratio: float = UNKNOWN, busy: Sequence[float] | None = None
) -> list[int]:
    """How many of ``count`` equal passes each stage runs before the schedule.

    They are chosen so that the schedule begins as early as it can: the latest of the stages, each
    counted from when its first micro-batch could be there, is as early as possible, and where
    several stages would do the last one runs the pass, whose states need not be sent.

    Args:
        count: passes.
        stages: of the pipeline.
        ratio: time of a pass / time by which a stage waits longer than the one before, which is
            that of a micro-batch's forward through one model chunk.
        busy: what each stage has to do before, in that time; where ``ratio`` is ``UNKNOWN``, in
            passes.

    Returns:
        By stage, ``count`` in sum.
    """
    cost, wait = (1.0, 0.0) if ratio == UNKNOWN else (ratio, 1.0)
    before = [0.0] * stages if busy is None else busy
    free = [(before[stage] - stage * wait, -stage) for stage in range(stages)]
    heapq.heapify(free)
    parts = [0] * stages
    for _ in range(count):
        at, stage = free[0]
        parts[-stage] += 1
        heapq.heapreplace(free, (at + cost, stage))
    return parts


def pass_size(count: int, stages: int, length: int) -> int:
    """Sequences of one pass where the stages of a pipeline share ``count`` of them.

    No more than fill a GPU, and no more than an even share, so that each stage has some.
    """
    return max(1, min(MAX_SEQUENCES, PASS_TOKENS // length, -(-count // stages)))


def sequences_by_stage(
    count: int,
    stages: int,
    length: int,
    ratio: float = UNKNOWN,
    busy: Sequence[float] | None = None,
) -> list[int]:
    """How many sequences each stage of a pipeline runs through a teacher that all stages hold.

    Args:
        count: sequences of the step that are this pipeline's: of all that the teacher teaches in
            the step of a data-parallel rank, the part of one of its TP x CP ranks.
        stages: of the pipeline.
        length: tokens of each.
        ratio: as of ``shares``, for one sequence.
        busy: as of ``shares``; where ``ratio`` is ``UNKNOWN``, in sequences.
    """
    size = pass_size(count, stages, length)
    if busy is not None and ratio == UNKNOWN:
        busy = [sequences / size for sequences in busy]
    ends, done = [], 0
    for part in shares(-(-count // size), stages, ratio * size, busy):
        done = min(count, done + part * size)
        ends.append(done)
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


class Loads:
    """What each stage of a pipeline has to do before a step's schedule, teacher by teacher.

    Every rank of the pipeline counts the same, so that all agree on who runs what.

    Args:
        stages: of the pipeline.
    """

    def __init__(self, stages: int) -> None:
        self.stages = stages
        self._busy = [0.0] * stages

    def begin(self) -> None:
        """Start a step."""
        self._busy = [0.0] * self.stages

    def share(self, count: int, length: int, ratio: float) -> list[int]:
        """``sequences_by_stage`` of the next teacher, beside what is to be done already."""
        parts = sequences_by_stage(count, self.stages, length, ratio, self._busy)
        self.add(parts, ratio)
        return parts

    def add(self, sequences: Sequence[float], ratio: float) -> None:
        """Count sequences of a teacher, by stage."""
        cost = 1.0 if ratio == UNKNOWN else ratio
        self._busy = [busy + cost * own for busy, own in zip(self._busy, sequences, strict=True)]

    def head_starts(self, ratio: float) -> list[float]:
        """By stage, how much later than the first it may end, in sequences of the next teacher
        that it has less to do; the least is 0."""
        cost, wait = (1.0, 0.0) if ratio == UNKNOWN else (ratio, 1.0)
        free = [(busy - i * wait) / cost for i, busy in enumerate(self._busy)]
        return [at - min(free) for at in free]
