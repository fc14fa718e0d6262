"""Measures held-out pairs of answers where Megatron evaluates.

The evaluation's own forward passes give the student's log-probabilities: the last stage hands over
its states before any logits exist, and each answer becomes one number, wherever its tokens are. The
reference runs as in training. Ranks that share sequences and those that share a batch add up what
they hold when all pairs are read, so that every pair counts once at any layout.

A run that only evaluates has no original model, so with ``reference: original`` log-probabilities
are all that it tells; loss, margin and rewards follow from those of two such runs.

Shapes: n micro-batches, b samples each, s sequence, c context-parallel size, P held-out pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject.data.held_out_pairs import HeldOutPairs
from megatron_moe_inject.data.labels import HostGroup
from megatron_moe_inject.host.megatron_types import Groups
from megatron_moe_inject.host.own_tokens import OwnTokens
from megatron_moe_inject.host.rng import untouched_rng
from megatron_moe_inject.host.step import Step, StepPart
from megatron_moe_inject.host.term_log import TermLog
from megatron_moe_inject.host.to_device import to_device
from megatron_moe_inject.losses.preference import PreferenceSpec, answer_log_probs
from megatron_moe_inject.losses.rows import RowKernels
from megatron_moe_inject.losses.student import Student
from megatron_moe_inject.preference.answers import of_tokens, sums_of_answers
from megatron_moe_inject.preference.measured_pairs import MeasuredPairs
from megatron_moe_inject.preference.pairing import numbers_of
from megatron_moe_inject.preference.reference import OriginalReference, TeacherReference


class HeldOutMeasurement(StepPart):
    """Measures them on this rank.

    Args:
        pairs: what is read.
        spec: which loss.
        against: see ``MeasuredPairs``.
        groups: the student's ``ProcessGroupCollection``.
        source: who reads data, for all model-parallel ranks.
        original: the original model where it is the reference, else ``None``.
        teacher: the teacher where that is, on the last stage.
        kernels: see ``losses.FusedOptions``.
        last: whether this rank is of the last stage.
        packed: whether samples are packed with documents.
        log: of the run.
        device: of the student.

    Attributes:
        active: whether the evaluation that runs is of pairs.
        measured: of the last evaluation; ``None`` where time was up, or before.
    """

    def __init__(
        self,
        pairs: HeldOutPairs,
        spec: PreferenceSpec,
        against: str | None,
        *,
        groups: Groups,
        source: HostGroup,
        original: OriginalReference | None,
        teacher: TeacherReference | None,
        kernels: RowKernels | str | None,
        last: bool,
        packed: bool,
        log: TermLog,
        device: torch.device,
    ) -> None:
        self.reads_tokens = packed
        self.active = False
        self.measured: MeasuredPairs | None = None
        self._pairs = pairs
        self._spec = spec
        self._against = against
        self._groups = groups
        self._source = source
        self._original = original
        self._teacher = teacher
        self._kernels = kernels
        self._last = last
        self._log = log
        self._device = device
        self._own_tokens = OwnTokens(groups, sequence_parallel=False, packed=False)
        self._rows = torch.zeros(0, 0, 0, dtype=torch.int64)
        self._sums = torch.zeros(0, 3, dtype=torch.float64)
        pairs.evaluated = self._evaluated

    def _evaluated(self, run_through: Callable[[], bool], given: dict[str, Any]) -> None:
        """Measure what ``run_through`` evaluates, and log it as Megatron does an evaluation.

        Collectives: those of the evaluation; on the last stage one all-reduce of 6 P float64 over
        the data- and context-parallel ranks, and one broadcast of as many over the whole world.
        """
        count = 2 * self._pairs.pairs
        self._sums = torch.zeros(count, 3, dtype=torch.float64, device=self._device)
        self.measured, self.active = None, True
        try:
            with untouched_rng(self._device):
                whole = run_through()
        finally:
            self.active = False
        if not whole:
            return
        sums = self._sums
        if self._last and self._groups.dp_cp.size() > 1:
            dist.all_reduce(sums, group=self._groups.dp_cp)
        dist.broadcast(sums, src=dist.get_world_size() - 1)  # it is of the last stage
        log_probs, reference, tokens = sums.cpu().view(-1, 2, 3).unbind(-1)
        self.measured = MeasuredPairs(
            tuple(self._pairs.hashes),
            log_probs,
            tokens,
            self._spec,
            self._against,
            None if self._against is None else reference,
            tuple(self._pairs.entries),
        )
        self._log.print_held_out("validation", self.measured.means(), given)

    def begin(self, step: Step) -> None:
        """Find the answers of an evaluation step of pairs, and let the original model read them.

        Collectives: those of ``numbers_of`` and of ``OriginalReference.log_probs``.
        """
        if not self.active:
            return
        numbers = numbers_of(step, self._source, self._pairs.documents)
        rows = self._own_tokens.of_rank(of_tokens(numbers, step.starts, step.sequence_length))
        self._rows = to_device(rows, self._device)
        if self._original is not None:
            log_probs = self._original.log_probs(step)
            if self._last:
                self._add(1, log_probs, self._rows.flatten(0, 1))

    def read(self, micro_batch: int, student: Student) -> None:
        """Take a micro-batch of such a step on the last stage.

        Args:
            micro_batch: its place in the step.
            student: hidden states ``[s/c, b, h]``, not sequence-sharded, and labels ``[s/c, b]``.

        Collectives: those of ``answer_log_probs``, and of ``TeacherReference.of_micro_batch``.
        """
        rows = self._rows[micro_batch]
        self._add(0, answer_log_probs(student, self._kernels), rows)
        if self._teacher is not None:
            self._add(1, self._teacher.of_micro_batch(micro_batch, student.labels), rows)
        self._add(2, student.labels >= 0, rows)

    def _add(self, column: int, values: torch.Tensor, rows: torch.Tensor) -> None:
        self._sums[:, column] += sums_of_answers(values, rows, len(self._sums))
