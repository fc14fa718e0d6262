"""What a step does about pairs of answers before and after the schedule.

Before it, the student runs forward over the step's answers alone, and the reference, the original
model or a teacher, does. Each gives every answer one number, the sum of its log-probabilities. The
ranks that share sequences and those that share the batch add up what they hold, so that each knows
all pairs of the batch, wherever their answers are; from these follow loss, margin and the weight of
every answer's tokens (``losses.preference``), which the schedule then trains with (``term.py``).

Shapes: n micro-batches, b samples each, m documents of a sample, s sequence, c context-parallel
size, p pairs of the batch, k samples with answers on this rank.
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
from megatron_moe_inject.host.indices import index
from megatron_moe_inject.host.labels import PREFERENCE
from megatron_moe_inject.host.megatron_types import Config, Groups
from megatron_moe_inject.host.own_tokens import OwnTokens
from megatron_moe_inject.host.step import Step, StepPart
from megatron_moe_inject.host.to_device import to_device
from megatron_moe_inject.losses.preference import PairTerms, PreferenceSpec, preference_loss
from megatron_moe_inject.preference.answers import (
    NO_ANSWERS,
    AnswerReader,
    Answers,
    of_tokens,
    sums_of_answers,
)
from megatron_moe_inject.preference.pairing import Pairing, pairing
from megatron_moe_inject.preference.reference import OriginalReference, TeacherReference
from megatron_moe_inject.preference.term import PreferenceTerm
from megatron_moe_inject.preference.terms import by_name
from megatron_moe_inject.retention.selected_pass import SelectedPass


class PreferenceStep(StepPart):
    """The preference of a step on one rank.

    Args:
        spec: what is minimised.
        weights_at: coeff and sft after that many optimizer steps.
        documents: gives m, see ``data.labels.ANSWERS``.
        config: the student's.
        groups: its ``ProcessGroupCollection``.
        source: who reads data, for all model-parallel ranks.
        data_parallel: the data-parallel ranks, over gloo; ``None`` for one.
        selected: runs the student over the answers.
        reader: reads them, on the last stage; ``None`` elsewhere.
        original: the original model where it is the reference, else ``None``.
        teacher: the teacher where that is, on the last stage.
        labels: tells adapters of domains which domain tokens are of; ``None`` without such.
        term: gets the weights; ``None`` on other stages than the last.
        device: of the student.
        held_out: measures held-out pairs in evaluations; ``None`` where there are none.
    """

    reads_tokens = True

    def __init__(
        self,
        spec: PreferenceSpec,
        weights_at: Callable[[int], tuple[float, float]],
        *,
        documents: Callable[[], int],
        config: Config,
        groups: Groups,
        source: HostGroup,
        data_parallel: dist.ProcessGroup | None,
        selected: SelectedPass,
        reader: AnswerReader | None,
        original: OriginalReference | None,
        teacher: TeacherReference | None,
        labels: LabelledStep | None,
        term: PreferenceTerm | None,
        device: torch.device,
        held_out: StepPart | None = None,
    ) -> None:
        self._spec = spec
        self._weights_at = weights_at
        self._documents = documents
        self._config = config
        self._groups = groups
        self._source = source
        self._data_parallel = data_parallel
        self._selected = selected
        self._reader = reader
        self._original = original
        self._teacher = teacher
        self._labels = labels
        self._term = term
        self._device = device
        self._held_out = StepPart() if held_out is None else held_out
        self._own_tokens = OwnTokens(groups, sequence_parallel=False, packed=False)
        self._values: Mapping[str, torch.Tensor] = {}

    def begin(self, step: Step) -> None:
        """Measure the answers of a training step; other steps have none but held-out ones.

        Collectives: those of ``pairing``; where the batch has a pair those of the passes, and on
        the last stage one all-reduce of 6 p float64 over the data- and context-parallel ranks.

        Raises:
            RecipeError: on every rank: see ``pairing``.
        """
        if self._term is not None:
            self._term.clear()
        self._values = {}
        if not step.training:
            self._held_out.begin(step)
            return
        found = pairing(step, self._source, self._data_parallel, self._documents())
        answers, reference = NO_ANSWERS, NO_ANSWERS.log_probs
        if found.pairs:
            answers = self._of_student(step)
            reference = self._of_reference(step, answers.labels)
        if self._term is None:
            return
        rows = of_tokens(found.rows, step.starts, step.sequence_length)
        rows = to_device(self._own_tokens.of_rank(rows), self._device)
        answered = (step.labels == PREFERENCE).flatten().nonzero().flatten().tolist()
        rows_read = rows.flatten(0, 1).index_select(0, index(answered, self._device))
        table = self._table(found, answers, reference, rows_read)
        terms = preference_loss(table[..., 0], table[..., 1], table[..., 2], self._spec)
        self._values = _reported(terms, table)
        if not found.pairs:
            return
        coeff, sft = self._weights_at(step.iteration)
        weights = coeff * terms.weights
        weights[:, 0] += sft / table[:, 0, 2]
        places = index(found.places, self._device)
        own = (weights / found.pairs).flatten().index_select(0, places).float()
        tokens = to_device(torch.tensor(float(found.tokens)), self._device)
        scale = step_scale(self._config, self._groups, tokens, self._device)
        self._term.begin(rows, own, scale)

    def _of_student(self, step: Step) -> Answers:
        """Those of the student; on other stages than the last nothing."""
        wanted = step.labels == PREFERENCE
        count = int(wanted.sum())
        passed = 0

        def process(*, labels: torch.Tensor, hidden_states: torch.Tensor, **seen: Any) -> Any:
            nonlocal passed
            assert self._reader is not None, "the last stage"
            size = self._selected.size
            begin, passed = passed, passed + size
            rows = range(max(0, min(size, count - begin)))
            self._reader.read(rows, size, hidden_states=hidden_states, labels=labels, **seen)
            return hidden_states.new_zeros(labels.shape, dtype=torch.float32)

        def model(rounds: int, size: int) -> contextlib.AbstractContextManager[Any]:
            if self._labels is None:
                return contextlib.nullcontext()
            return self._labels.of_pass(step, torch.full((rounds, size), PREFERENCE))

        if self._reader is not None:
            self._reader.begin()
        self._selected.run(step, wanted, process, model)
        return NO_ANSWERS if self._reader is None else self._reader.taken()

    def _of_reference(self, step: Step, labels: torch.Tensor) -> torch.Tensor:
        """Of labels ``[s/c, k]``, likewise."""
        if self._original is not None:
            return self._original.log_probs(step)
        return (
            NO_ANSWERS.log_probs if self._teacher is None else self._teacher.log_probs(step, labels)
        )

    def _table(
        self, found: Pairing, answers: Answers, reference: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """Of all pairs and both answers: log-probability by student and reference, tokens,
        ``[p, 2, 3]``; ``rows`` ``[k, s/c]`` says which answer a token is of."""
        table = torch.zeros(2 * found.pairs, 3, dtype=torch.float64, device=self._device)
        if found.places:
            count = len(found.places)
            values = (answers.log_probs, reference, answers.labels >= 0)
            own = torch.stack([sums_of_answers(each, rows, count) for each in values], dim=1)
            table.index_copy_(0, index(found.places, self._device), own)
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
    values = by_name(terms, table[..., 0])
    return {name: sum_and_count(each.sum(), count).float() for name, each in values.items()}
