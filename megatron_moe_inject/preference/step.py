"""What a step does about pairs of answers before and after the schedule.

Before it, the student runs forward over the step's answers alone, and the reference, the original
model or a teacher, does. Each gives every answer one number, the sum of its log-probabilities. The
ranks that share sequences and those that share the batch add up what they hold, so that each knows
all pairs of the batch, wherever their answers are; from these follow loss, margin and the weight of
every answer's tokens (``losses.preference``), which the schedule then trains with (``term.py``).

Shapes: n micro-batches, b samples each, p pairs of the batch, k answers on this rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject.adapters.token_labels import LabelledStep
from megatron_moe_inject.data.labels import HostGroup
from megatron_moe_inject.host.attached_loss import add_reports, step_scale, sum_and_count
from megatron_moe_inject.host.labels import PREFERENCE
from megatron_moe_inject.host.megatron_types import Config, Groups
from megatron_moe_inject.host.step import Step, StepPart
from megatron_moe_inject.losses.preference import (
    PairTerms,
    PreferenceSpec,
    answer_sums,
    preference_loss,
)
from megatron_moe_inject.losses.rows import RowKernels
from megatron_moe_inject.losses.student import Student, Vocabulary
from megatron_moe_inject.losses.target import Dense
from megatron_moe_inject.preference.answers import NO_ANSWERS, Answers, AnswerSums
from megatron_moe_inject.preference.pairing import Pairing, pairing
from megatron_moe_inject.preference.term import PreferenceTerm
from megatron_moe_inject.retention.original_pass import OriginalPass
from megatron_moe_inject.retention.selected_pass import SelectedPass
from megatron_moe_inject.teachers.step_teachers import StepTeachers

LOSS = "preference loss"
ACCURACY = "preference accuracy"
MARGIN = "preference margin"
REWARD = "preference reward"
LOG_PROB = "preference log prob"
SIDES = ("chosen", "rejected")


class TeacherReference:
    """A teacher as reference, on the last pipeline stage; runs with the step's other teachers.

    Args:
        teachers: those of the step.
        vocabulary: the student's, by which the teacher's head is sharded.
        kernels: see ``losses.FusedOptions``.
    """

    def __init__(
        self,
        teachers: StepTeachers,
        vocabulary: Vocabulary,
        kernels: RowKernels | str | None,
    ) -> None:
        self._teachers = teachers
        self._vocabulary = vocabulary
        self._kernels = kernels

    @torch.no_grad()
    def log_probs(self, step: Step, labels: torch.Tensor) -> torch.Tensor:
        """``answer_sums`` of the step's answers, ``[k]``, of labels ``[s/c, k]``.

        Collectives: those of ``answer_sums``.
        """
        wanted = step.labels == PREFERENCE
        teacher = self._teachers.reference
        assert teacher is not None, "the last stage has the reference"
        if not wanted.any():
            return NO_ANSWERS.log_probs
        _, target = teacher.of_step(wanted)
        assert isinstance(target, Dense), "checked: a teacher that runs a model"
        hidden = target.hidden.transpose(0, 1)
        student = Student(hidden, target.head, labels, self._vocabulary, target.transform)
        return answer_sums(student, self._kernels)


class PreferenceStep(StepPart):
    """The preference of a step on one rank.

    Args:
        spec: what is minimised.
        weights_at: coeff and sft after that many optimizer steps.
        config: the student's.
        groups: its ``ProcessGroupCollection``.
        source: who reads data, for all model-parallel ranks.
        data_parallel: the data-parallel ranks, over gloo; ``None`` for one.
        selected: runs the student over the answers.
        answers: reads them of the student, and of the original, on the last stage; ``None``
            elsewhere.
        original: the original model where it is the reference, else ``None``.
        teacher: the teacher where that is, on the last stage.
        labels: tells adapters of domains which domain tokens are of; ``None`` without such.
        term: gets the weights; ``None`` on other stages than the last.
        device: of the student.
    """

    reads_tokens = True

    def __init__(
        self,
        spec: PreferenceSpec,
        weights_at: Callable[[int], tuple[float, float]],
        *,
        config: Config,
        groups: Groups,
        source: HostGroup,
        data_parallel: dist.ProcessGroup | None,
        selected: SelectedPass,
        answers: tuple[AnswerSums, AnswerSums] | None,
        original: OriginalPass | None,
        teacher: TeacherReference | None,
        labels: LabelledStep | None,
        term: PreferenceTerm | None,
        device: torch.device,
    ) -> None:
        self._spec = spec
        self._weights_at = weights_at
        self._config = config
        self._groups = groups
        self._source = source
        self._data_parallel = data_parallel
        self._selected = selected
        self._answers = answers
        self._original = original
        self._teacher = teacher
        self._labels = labels
        self._term = term
        self._device = device
        self._values: Mapping[str, torch.Tensor] = {}
        if original is not None:
            original.reader = self._read_original

    def _read_original(self, rows: Any, **seen: Any) -> None:
        if self._answers is not None:
            self._answers[1].read(rows, **seen)

    def begin(self, step: Step) -> None:
        """Measure the answers of a training step; other steps have none.

        Collectives: those of ``pairing``; where the batch has a pair those of the passes, and on
        the last stage one all-reduce of 6 p float64 over the data- and context-parallel ranks.

        Raises:
            RecipeError: on every rank: see ``pairing``.
        """
        if self._term is not None:
            self._term.clear()
        self._values = {}
        if not step.training:
            return
        found = pairing(step, self._source, self._data_parallel)
        answers, reference = NO_ANSWERS, NO_ANSWERS.log_probs
        if found.pairs:
            answers = self._of_student(step)
            reference = self._of_reference(step, answers.labels)
        if self._term is None:
            return
        table = self._table(found, answers, reference)
        terms = preference_loss(table[..., 0], table[..., 1], table[..., 2], self._spec)
        self._values = _reported(terms, table)
        if not found.pairs:
            return
        coeff, sft = self._weights_at(step.iteration)
        weights = coeff * terms.weights
        weights[:, 0] += sft / table[:, 0, 2]
        places = torch.tensor(found.places).to(self._device, non_blocking=True)
        own = (weights / found.pairs).flatten().index_select(0, places).float()
        tokens = torch.tensor(float(found.tokens)).to(self._device, non_blocking=True)
        scale = step_scale(self._config, self._groups, tokens, self._device)
        self._term.begin(found.samples, own, scale)

    def _of_student(self, step: Step) -> Answers:
        """Those of the student; on other stages than the last nothing."""
        wanted = step.labels == PREFERENCE
        count = int(wanted.sum())
        passed = 0

        def process(*, labels: torch.Tensor, hidden_states: torch.Tensor, **seen: Any) -> Any:
            nonlocal passed
            assert self._answers is not None, "the last stage"
            begin, passed = passed, passed + len(labels)
            rows = range(max(0, min(len(labels), count - begin)))
            self._answers[0].read(rows, hidden_states=hidden_states, labels=labels, **seen)
            return hidden_states.new_zeros(labels.shape, dtype=torch.float32)

        def model(rounds: int, size: int) -> contextlib.AbstractContextManager[Any]:
            if self._labels is None:
                return contextlib.nullcontext()
            return self._labels.of_pass(step, torch.full((rounds, size), PREFERENCE))

        if self._answers is not None:
            self._answers[0].begin()
        self._selected.run(step, wanted, process, model)
        return NO_ANSWERS if self._answers is None else self._answers[0].taken()

    def _of_reference(self, step: Step, labels: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the reference, ``[k]``, of labels ``[s/c, k]``."""
        if self._original is not None:
            if not self._original.holds:  # else it has run with the teachers
                self._original.run(step)
                self._original.close()
            read = NO_ANSWERS if self._answers is None else self._answers[1].taken()
            return read.log_probs
        if self._teacher is None:
            return NO_ANSWERS.log_probs
        return self._teacher.log_probs(step, labels)

    def _table(self, found: Pairing, answers: Answers, reference: torch.Tensor) -> torch.Tensor:
        """Of all pairs and both answers: log-probability by student and reference, tokens,
        ``[p, 2, 3]``."""
        table = torch.zeros(2 * found.pairs, 3, dtype=torch.float64, device=self._device)
        if found.places:
            places = torch.tensor(found.places).to(self._device, non_blocking=True)
            tokens = (answers.labels >= 0).sum(0).double()
            own = torch.stack([answers.log_probs, reference, tokens], dim=1)
            table.index_copy_(0, places, own)
        group = self._groups.dp_cp
        if found.pairs and group.size() > 1:
            dist.all_reduce(table, group=group)
        return table.view(found.pairs, 2, 3)

    def end(self, step: Step, reports: Any) -> None:
        """Report the pairs of the batch. No collective."""
        add_reports(reports, self._values)


def _reported(terms: PairTerms, table: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over the p pairs of the batch and their number, by name; ``table`` is ``[p, 2, 3]``."""
    count = torch.full((), float(len(table)), device=table.device)
    values = {
        LOSS: terms.loss,
        ACCURACY: (terms.margins > 0).double(),
        MARGIN: terms.margins,
    }
    for name, of_sides in ((REWARD, terms.rewards), (LOG_PROB, table[..., 0])):
        values |= {f"{name}/{side}": of_sides[:, i] for i, side in enumerate(SIDES)}
    return {name: sum_and_count(each.sum(), count).float() for name, each in values.items()}
