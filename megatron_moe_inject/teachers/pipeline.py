"""A step's teachers run by all stages of a pipeline, before the schedule.

The last stage knows what is to be read and needs what the teachers say of it. Before the schedule
its rank at each data-, tensor- and context-parallel place sends the ranks at that place in the
other stages what they are to read, runs its own part, and gets the states of theirs. All that is
sent of a step goes in one exchange there and one back. The last stage expects the states before it
runs its own part, so that a stage which has sent its own goes on to its first micro-batch at once.

A teacher whose experts lie on several ranks of a stage (``expert_parallel``) is shared evenly,
whatever else the stages do: the tokens that an expert gets at once are those of several pipelines,
and with other shares they would be others.

Shapes: k samples that a teacher teaches in the step, s sequence, h_t teacher hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_moe_inject.data.packed import document_lengths
from megatron_moe_inject.host.step import Step
from megatron_moe_inject.teachers.base import Teacher
from megatron_moe_inject.teachers.documents import DocumentWork
from megatron_moe_inject.teachers.forward import SampleWork
from megatron_moe_inject.teachers.pace import Pace
from megatron_moe_inject.teachers.prefix import PrefixedTeacher
from megatron_moe_inject.teachers.spread import UNKNOWN, Loads


class Work(Protocol):
    """Which stage runs what of a teacher's samples: ``SampleWork`` or ``DocumentWork``."""

    def tokens(self, stage: int) -> tuple[int, ...]:
        """Shape of what a stage's states are of, ``[k', s]`` or ``[t]``."""
        ...

    def inputs(self, stage: int, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What a stage reads of the teacher's inputs."""
        ...

    def shapes(self, stage: int, inputs: int) -> list[tuple[int, ...]]:
        """Shapes of ``inputs``, of so many tensors."""
        ...

    def sequences(self, stage: int) -> float:
        """How much a stage runs, in sequences."""
        ...

    def run(
        self, stage: int, teacher: Teacher, inputs: Sequence[torch.Tensor], layers: Sequence[int]
    ) -> list[torch.Tensor]:
        """States of a stage's inputs, empty without any. Collectives: those of
        ``Teacher.passes``."""
        ...

    def together(self, mine: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        """All states ``[k, s, h_t]`` on the last stage, of those of this place, stage by stage."""
        ...


@dataclass(frozen=True)
class Reading:
    """What is to be read in a step.

    Attributes:
        selected: ``[n, b]`` bool on the host, the samples.
        sequence_length: s.
        bare: also without a prefix.
        starts: ``[k, s]`` bool on the host, where their documents begin; None unless packed.
    """

    selected: torch.Tensor
    sequence_length: int
    bare: bool = False
    starts: torch.Tensor | None = None


@dataclass(frozen=True)
class SpreadTeacher:
    """A teacher that all stages of a pipeline hold.

    Attributes:
        teacher: the same on every rank.
        layers: those whose states are wanted besides.
        masked: whether it also reads ``position_ids`` and ``attention_mask``.
        window: micro-batches whose samples are shared before the schedule, the first ones; 0 all.
    """

    teacher: Teacher
    layers: Sequence[int]
    masked: bool = False
    window: int = 0

    @property
    def inputs(self) -> Sequence[torch.dtype]:
        """Types of what it reads."""
        return (torch.int64, torch.int64, torch.bool) if self.masked else (torch.int64,)

    def reading(
        self,
        selected: torch.Tensor,
        sequence_length: int,
        bare: bool,
        starts: torch.Tensor | None,
    ) -> Reading:
        """What it is to read before the schedule, of ``selected`` ``[n, b]`` samples with
        ``starts`` ``[n, b, s]``: those of its first window."""
        if self.window:
            selected = selected[: self.window]
            starts = None if starts is None else starts[: self.window]
        return Reading(
            selected, sequence_length, bare, None if starts is None else starts[selected]
        )

    def runs(self, reading: Reading) -> list[tuple[Teacher, Sequence[int]]]:
        """The teacher with its layers, and where asked for the one behind its prefix."""
        runs: list[tuple[Teacher, Sequence[int]]] = [(self.teacher, self.layers)]
        if reading.bare and isinstance(self.teacher, PrefixedTeacher):
            runs.append((self.teacher.bare, ()))
        return runs


@dataclass
class _Job:
    """One teacher in one step.

    Attributes:
        states: on the last stage, for each layer of each run the place for what all stages say,
            one stage behind the other.
        own: views of this stage's part of them.
        take: on the last stage, gets the states of all runs' layers.
    """

    spread: SpreadTeacher
    reading: Reading
    work: Work
    inputs: Sequence[torch.Tensor]
    take: Callable[[list[torch.Tensor]], None] | None = None
    states: list[torch.Tensor] = field(default_factory=list)
    own: list[torch.Tensor] = field(default_factory=list)

    def by_stage(self, stages: int) -> list[list[torch.Tensor]]:
        """Room for the states of each stage, of all runs' layers: views of one tensor a layer."""
        sizes = [self.work.tokens(stage) for stage in range(stages)]
        rows = [size[0] for size in sizes]
        for teacher, layers in self.spread.runs(self.reading):
            like = teacher.head_weight(0, 0)
            shape = (sum(rows), *sizes[0][1:], teacher.hidden_size)
            self.states += [like.new_empty(shape) for _ in range(1 + len(layers))]
        return [list(views) for views in zip(*(s.split(rows) for s in self.states), strict=True)]


class Pipeline:
    """The ranks of a pipeline at one place, as they run teachers together.

    Args:
        group: the pipeline group.
        share_group: the TP x CP ranks of a stage, which share the samples.
        pace: what has been measured. A teacher that it does not measure is shared evenly.
        device: where teachers run.
        names: of the teachers that all stages hold, in their order.

    Attributes:
        names: as given.

    Collectives: one all-reduce of one number over ``group``.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        share_group: dist.ProcessGroup,
        pace: Pace,
        device: torch.device,
        names: Sequence[str],
    ) -> None:
        self.names = tuple(names)
        self._group = group
        self._place = (share_group.rank(), share_group.size())
        self._share_group = share_group if share_group.size() > 1 else None
        self._device = device
        self._ranks = dist.get_process_group_ranks(group)
        self._stage, self._last = group.rank(), group.size() - 1
        self._pace = pace
        self._loads = Loads(group.size())
        self._jobs: list[_Job] = []
        self._sending = self._coming = _Exchange()
        # What is sent between some ranks of a group needs what a collective of all of them makes.
        dist.all_reduce(torch.zeros(1, device=device), group=group)

    def begin(self, training: bool) -> None:
        """Start a step. Collectives: those of ``Pace.begin``."""
        self._pace.begin(training)
        self._loads.begin()
        self._jobs = []

    def add(
        self,
        spread: SpreadTeacher,
        reading: Reading,
        inputs: Sequence[torch.Tensor] = (),
        take: Callable[[list[torch.Tensor]], None] | None = None,
    ) -> None:
        """A teacher that is to run in this step, on each rank of the pipeline in the same order.

        Args:
            inputs: on the last stage, what it reads of the k samples.
            take: there, gets ``[k, s, h_t]`` for each layer of each of ``spread.runs``.
        """
        name, length = spread.teacher.name, reading.sequence_length
        loads, ratio = Loads(self._last + 1), UNKNOWN
        if name in self._pace.names:
            loads, ratio = self._loads, self._pace.ratio(name)
        work: Work
        if reading.starts is None:
            count = int(reading.selected.sum())
            work = SampleWork(count, length, self._place, loads, ratio)
        else:
            lengths = document_lengths(reading.starts)
            work = DocumentWork(lengths, length, self._place, loads, ratio)
        self._jobs.append(_Job(spread, reading, work, inputs, take))

    def start(self) -> None:
        """Send what the other stages are to read, and expect what they will say.

        Communication: from the last stage to each other one what that is to read, 8 bytes a token.
        """
        if self._stage == self._last:
            self._send_inputs()
        else:
            self._receive_inputs()

    def _send_inputs(self) -> None:
        operations = []
        for stage in range(self._last):
            for job in self._jobs:
                tensors = job.work.inputs(stage, job.inputs)
                operations += self._operations(dist.isend, tensors, stage)
        self._sending = _Exchange(operations)
        rooms = [job.by_stage(self._last + 1) for job in self._jobs]
        operations = []
        for stage in range(self._last):
            for room in rooms:
                operations += self._operations(dist.irecv, room[stage], stage)
        self._coming = _Exchange(operations)
        for job, room in zip(self._jobs, rooms, strict=True):
            job.own = room[self._last]

    def _receive_inputs(self) -> None:
        operations = []
        for job in self._jobs:
            dtypes = job.spread.inputs
            shapes = job.work.shapes(self._stage, len(dtypes))
            job.inputs = [
                torch.empty(shape, dtype=dtype, device=self._device)
                for shape, dtype in zip(shapes, dtypes, strict=True)
            ]
            operations += self._operations(dist.irecv, job.inputs, self._last)
        _Exchange(operations).wait()

    def finish(self) -> None:
        """Run this stage's part; the last stage then has all states.

        Communication: from each other stage to the last one the states of what it has run. The
        collectives of ``Work.run`` for each, on the last stage those of ``Work.together``.
        """
        if self._stage != self._last:
            operations = []
            for job in self._jobs:
                operations += self._operations(dist.isend, self._run(job), self._last)
            self._sending = _Exchange(operations)
            return
        for job in self._jobs:
            for room, states in zip(job.own, self._run(job), strict=False):
                room.copy_(states)
        self._coming.wait()
        for job in self._jobs:
            assert job.take is not None, "the last stage takes what is said"
            job.take([job.work.together(mine, self._share_group) for mine in job.states])
        self._jobs = []

    def _run(self, job: _Job) -> list[torch.Tensor]:
        """States of this stage's part, of all runs' layers; empty without a part."""
        sequences = job.work.sequences(self._stage)
        inputs = job.inputs
        if self._stage == self._last:
            inputs = job.work.inputs(self._stage, inputs)
        states = []
        for teacher, layers in job.spread.runs(job.reading):
            with self._pace.running(job.spread.teacher.name, sequences):
                states += job.work.run(self._stage, teacher, inputs, layers)
        return states

    def close(self) -> None:
        """Let what was sent go, which was received before the last stage's first micro-batch."""
        self._sending.wait()
        self._sending = self._coming = _Exchange()
        self._jobs = []

    def _operations(
        self, kind: Callable, tensors: Sequence[torch.Tensor], stage: int
    ) -> list[dist.P2POp]:
        peer = self._ranks[stage]
        return [dist.P2POp(kind, t, peer, self._group) for t in tensors if t.numel()]


class _Exchange:
    """Sends or receives under way; what they are of is kept until they are waited for."""

    def __init__(self, operations: Sequence[dist.P2POp] = ()) -> None:
        self._operations = operations
        self._requests = dist.batch_isend_irecv(list(operations)) if operations else []

    def wait(self) -> None:
        """What follows on the device, or here without one, runs once they are done."""
        for request in self._requests:
            request.wait()


@dataclass(frozen=True)
class Helper:
    """A teacher on a stage that needs nothing of what it says.

    Attributes:
        spread: it.
        domains: indices of those that it teaches.
    """

    spread: SpreadTeacher
    domains: Sequence[int]

    def reading(self, step: Step, bare: bool) -> Reading:
        """What it is to read in a step."""
        selected = torch.isin(step.labels, torch.tensor(self.domains))
        return self.spread.reading(selected, step.sequence_length, bare, step.starts)
