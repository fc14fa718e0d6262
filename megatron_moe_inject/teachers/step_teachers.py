"""The teachers of a step: run before the schedule, asked micro-batch by micro-batch inside it.

On the last pipeline stage they are the teachers of the recipe, each by its forward passes
(``step_pass``), and the original model, which teaches general samples where the recipe holds them
to it. Other stages have no teacher of the recipe, but take part in the original model's pass, and
help with teachers that all stages hold (``pipeline``).

Shapes: n micro-batches, b samples each, s sequence, c context-parallel size, h_t teacher hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch

from megatron_moe_inject.host.indices import index as positions
from megatron_moe_inject.host.labels import GENERAL, PREFERENCE
from megatron_moe_inject.host.step import Step, StepPart
from megatron_moe_inject.losses.objective import SampleGroup, TermWeights
from megatron_moe_inject.losses.rows import RowKernels
from megatron_moe_inject.losses.student import Vocabulary
from megatron_moe_inject.losses.target import Dense, Target
from megatron_moe_inject.losses.triton_rows import AUTO
from megatron_moe_inject.teachers.confidence import confidences
from megatron_moe_inject.teachers.pipeline import Helper, Pipeline
from megatron_moe_inject.teachers.step_pass import DomainTeacher, StepTeacher


class OriginalTeacher(Protocol):
    """The original model as a teacher of general samples."""

    def run(self, step: Step) -> None:
        """Before the schedule, on every stage."""
        ...

    def close(self) -> None:
        """After the schedule, also after one that failed."""
        ...

    def group(
        self, micro_batch: int, samples: Sequence[int], weights: TermWeights, head: torch.Tensor
    ) -> SampleGroup:
        """General samples of a micro-batch with what it says about them, on the last stage.

        Args:
            micro_batch: its place in the step.
            samples: positions in the batch.
            weights: of their loss.
            head: the student's ``[v/p, h]``, whose original it takes.
        """
        ...


class ComparesPrefix(Protocol):
    """What may want to know a teacher without its prefix, too."""

    @property
    def compares_prefix(self) -> bool:
        """Whether teachers are also to run without their prefix in the step that comes."""
        ...


class StepTeachers(StepPart):
    """The teachers of a step.

    Args:
        taught: by index of the domains that are distilled, their teacher or teachers; empty on
            other stages than the last.
        original: teaches general samples; ``None`` where nothing holds them.
        valid_vocab_size: ids of the student's tokenizer.
        kernels: see ``losses.FusedOptions``.
        see: is shown what each teacher hands out, by name.
        compares_prefix: whether teachers are also to run without their prefix, asked each step.
        packed: whether samples are packed with documents.
        pipeline: the stages that run some of the teachers together; None where none is run so.
        helpers: on other stages than the last, those teachers, in the order of the last one's.
        reference: runs over pairs of answers as well, for what asks it of the whole step
            (``of_step``); None where no preference is measured against it, or not the last stage.

    Attributes:
        original: as given; may be left out for a while.
        reference: as given.
    """

    def __init__(
        self,
        taught: Mapping[int, DomainTeacher],
        original: OriginalTeacher | None = None,
        *,
        valid_vocab_size: int,
        kernels: RowKernels | str | None = AUTO,
        see: Callable[[str, torch.Tensor], None] = lambda name, states: None,
        compares_prefix: Callable[[], bool] = lambda: False,
        packed: bool = False,
        pipeline: Pipeline | None = None,
        helpers: Sequence[Helper] = (),
        reference: StepTeacher | None = None,
    ) -> None:
        self.reference = reference
        self.reads_tokens = packed
        self._pipeline = pipeline
        self._helpers = tuple(helpers)
        self._taught = taught
        self.original = original
        self._valid_vocab_size = valid_vocab_size
        self._kernels = kernels
        self._see = see
        self._compares_prefix = compares_prefix

    @property
    def passes(self) -> dict[str, StepTeacher]:
        """Those of the recipe's teachers that run on this rank, by name."""
        passes = [run for teacher in self._taught.values() for run in teacher.passes]
        if self.reference is not None:
            passes.append(self.reference)
        return {run.name: run for run in passes}

    @property
    def domains(self) -> list[int]:
        """Indices of the domains that are distilled, on the last stage."""
        return list(self._taught)

    def taught_by(self, teacher: StepTeacher) -> list[int]:
        """Labels of what ``teacher`` reads: indices of the domains that it teaches, and
        ``PREFERENCE`` of the reference."""
        return [
            *(
                index
                for index, domain_teacher in self._taught.items()
                if teacher in domain_teacher.passes
            ),
            *([PREFERENCE] if teacher is self.reference else []),
        ]

    def begin(self, step: Step) -> None:
        """Run the teachers ahead, then the original model.

        Collectives: those of ``StepTeacher.begin`` for each teacher, of ``Pipeline``, and of the
        original's pass.
        """
        bare = self._compares_prefix()
        alone = self.passes
        if self._pipeline is not None:
            self._pipeline.begin(step.training)
            for helper in self._helpers:
                self._pipeline.add(helper.spread, helper.reading(step, bare))
            names = self._pipeline.names
            self._begin([run for name, run in alone.items() if name in names], step, bare)
            alone = {name: run for name, run in alone.items() if name not in names}
            self._pipeline.start()
        self._begin(alone.values(), step, bare)
        if self._pipeline is not None:
            self._pipeline.finish()
        if self.original is not None:
            self.original.run(step)

    def _begin(self, runs: Iterable[StepTeacher], step: Step, bare: bool) -> None:
        for run in runs:
            wanted = torch.isin(step.labels, torch.tensor(self.taught_by(run)))
            run.begin(step.as_read, wanted, step.sequence_length, bare=bare, starts=step.starts)

    def close(self) -> None:
        """Let the original's states go, and what was sent to the last stage."""
        if self.original is not None:
            self.original.close()
        if self._pipeline is not None:
            self._pipeline.close()

    def groups(
        self,
        micro_batch: int,
        domains: Sequence[int],
        labels: torch.Tensor,
        weights: Mapping[int, TermWeights],
        head: torch.Tensor,
    ) -> list[SampleGroup]:
        """Samples of a micro-batch by equal weights and teacher; to be asked once each, in order.

        Args:
            micro_batch: its place in the step.
            domains: index or ``GENERAL`` of the b samples.
            labels: ``[b, s/c]``.
            weights: by domain index and ``GENERAL``.
            head: the student's ``[v/p, h]``.
        """
        members: dict[tuple[bool, TermWeights, DomainTeacher | None], list[int]] = {}
        for position, domain in enumerate(domains):
            kind = (domain == GENERAL, weights[domain], self._taught.get(domain))
            members.setdefault(kind, []).append(position)
        runs = list(self.passes.values())
        targets = {run: self._target(run, micro_batch, domains) for run in runs}
        bare_targets = targets | {
            run: (targets[run][0], run.bare_target(micro_batch)) for run in runs if run.ran_bare
        }
        groups = []
        for (general, weight, teacher), samples in members.items():
            if teacher is None:
                group = SampleGroup(samples, weight)
                if general and self.original is not None:
                    group = self.original.group(micro_batch, samples, weight, head)
                    self._see_states("the original model", group.target)
                groups.append(group)
                continue
            readable = self._readable(teacher, micro_batch, domains, samples, labels)
            ran_bare = any(run.ran_bare for run in teacher.passes)
            groups.append(
                SampleGroup(
                    samples,
                    weight,
                    _together(teacher, targets, samples),
                    readable,
                    _together(teacher, bare_targets, samples) if ran_bare else None,
                )
            )
        return groups

    def _target(
        self, teacher: StepTeacher, micro_batch: int, domains: Sequence[int]
    ) -> tuple[list[int], Target]:
        """Positions that ``teacher`` teaches in the micro-batch, and what it says of them."""
        taught, target = self.taught_by(teacher), teacher.target(micro_batch)
        self._see_states(f"teacher {teacher.name}", target)
        return [i for i, domain in enumerate(domains) if domain in taught], target

    def _see_states(self, name: str, target: Target | None) -> None:
        if isinstance(target, Dense):
            self._see(f"states of {name}", target.hidden)

    def _readable(
        self,
        teacher: DomainTeacher,
        index: int,
        domains: Sequence[int],
        samples: Sequence[int],
        labels: torch.Tensor,
    ) -> torch.Tensor | None:
        """Where all of a domain's teachers know the text of ``samples`` and the label,
        ``[k, s/c]``; None where they know it all."""
        known_by_all = None
        for member in teacher.passes:
            readable = member.readable(index)
            if readable is None:
                continue
            taught = [i for i, d in enumerate(domains) if d in self.taught_by(member)]
            known = _pick(taught, samples)(readable)
            if member.unknown is not None:
                targets = labels.index_select(0, positions(samples, labels.device))
                known = known & ~torch.isin(targets, member.unknown)
            known_by_all = known if known_by_all is None else known_by_all & known
        return known_by_all

    def confidences(self, kind: str, labels: torch.Tensor) -> torch.Tensor:
        """Of the teacher or teachers of each sample, fp32 ``[n, b, s/c]``; 0 where it has none, or
        one whose states come by windows. At least one must run the whole step ahead.

        Args:
            kind: see ``confidence.confidences``.
            labels: ``[n, b]`` on the host.

        Collectives: those of ``confidence.confidences``, for each such teacher or committee.
        """
        whole = None
        for domain_teacher in dict.fromkeys(self._taught.values()):
            if domain_teacher.windowed:
                continue
            domains = [index for index, other in self._taught.items() if other == domain_teacher]
            wanted = torch.isin(labels, torch.tensor(domains))
            sharded = (run.tp_group for run in domain_teacher.passes)
            group = next((group for group in sharded if group is not None), None)
            vocabulary = Vocabulary(group, self._valid_vocab_size)
            confidence = confidences(
                domain_teacher, kind, wanted, vocabulary, kernels=self._kernels
            )
            if whole is None:
                whole = confidence.new_zeros(labels.numel(), confidence.shape[1])
            where = wanted.flatten().nonzero().flatten().tolist()
            whole.index_copy_(0, positions(where, whole.device), confidence)
        assert whole is not None, "every teacher has a window"
        return whole.view(*labels.shape, -1)


def _together(
    teacher: DomainTeacher,
    targets: Mapping[StepTeacher, tuple[Sequence[int], Target]],
    samples: Sequence[int],
) -> Target:
    """What a domain's teacher or teachers say of some positions of a micro-batch."""
    of_each = []
    for run in teacher.passes:
        taught, target = targets[run]
        of_each.append(target.changed(_pick(taught, samples)))
    return teacher.together(of_each)


def _pick(taught: Sequence[int], samples: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Takes of a tensor that has a row for each of a teacher's positions those of some of them."""
    rows = [taught.index(position) for position in samples]
    if rows == list(range(len(taught))):
        return lambda tensor: tensor
    return lambda tensor: tensor.index_select(0, positions(rows, tensor.device))
