"""A served teacher in a step: the answers to its texts, on every rank that computes the loss.

The first of the TP x CP ranks that share a sequence on the last pipeline stage has the answers
(``step_answers``) and sends them to the others as they are: ids and log-probabilities, 8 bytes for
each id of each token. Each rank keeps its context-parallel part.

Ids that the student lacks take no part, as those of a model: what they had of the probability is
taken from the whole.

Shapes: n micro-batches, b samples each, k samples of a micro-batch or a step, s sequence, c
context-parallel size, i ids of a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_moe_inject.data.labels import samples_of
from megatron_moe_inject.host.context_parallel import context_parallel_slice
from megatron_moe_inject.host.step import MicroBatch
from megatron_moe_inject.losses.target import Sparse, Target
from megatron_moe_inject.recipe.run_kinds import EVALUATION
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext
from megatron_moe_inject.teachers.align.reading import Reading
from megatron_moe_inject.teachers.base import TeacherInfo
from megatron_moe_inject.teachers.served.protocols import Answer
from megatron_moe_inject.teachers.some_ids import SomeIdsTeacher, handed_on
from megatron_moe_inject.teachers.store.rules import taught_by


class AnswersOfStep:
    """What servers say of the step that begins, on the ranks that ask them.

    Attributes:
        by_teacher: of a teacher's k samples ids [k, s, i] int32, -1 where there is none, and
            log-probabilities [k, s, i] float32 at temperature 1, and those of the labels [k, s, 1].
        of_texts: of one with a tokenizer of its own what it reads, and log-probabilities of that.
        longest: by such a teacher, on every rank, ids of a text that its servers take; None without
            limit.
    """

    def __init__(self, longest: Mapping[str, int | None] | None = None) -> None:
        self.by_teacher: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.of_texts: dict[str, tuple[Reading, np.ndarray]] = {}
        self.longest = dict(longest or {})


class ServedTeacher(SomeIdsTeacher):
    """``step_pass.StepTeacher`` of servers.

    Args:
        name: its key in the recipe.
        answers: of the step; asked on the first rank of ``share_group`` alone.
        slots: i.
        temperature: at which it is distilled.
        tail: see ``losses.target.Sparse``.
        share_group: the TP x CP ranks that share a sequence; its first rank asks.
        cp_group: context-parallel group.
        device: where the loss is computed.
    """

    def __init__(
        self,
        name: str,
        answers: AnswersOfStep,
        slots: int,
        *,
        temperature: float,
        tail: str,
        share_group: dist.ProcessGroup,
        cp_group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        super().__init__(name, cp_group, device)
        self._answers = answers
        self._slots = slots
        self._temperature = temperature
        self._tail = tail
        self._group = share_group

    def begin(
        self,
        batches: Sequence[MicroBatch] | None,
        selected: torch.Tensor,
        sequence_length: int,
        *,
        bare: bool = False,
        starts: torch.Tensor | None = None,
    ) -> None:
        """Take the step's answers; see ``step_pass.StepTeacher``.

        Collectives: over the TP x CP ranks one broadcast of the ids, two of log-probabilities and
        one of the tokens; none where they are one rank or nothing is selected.
        """
        count = self._select(selected)
        shape = (count, sequence_length, self._slots)
        kinds = {
            "ids": (shape, torch.int32),
            "log_probs": (shape, torch.float32),
            "labels": ((*shape[:2], 1), torch.float32),
            "tokens": (shape[:2], torch.int64),
        }
        found = None
        if self._group.rank() == 0 and count:
            assert batches is not None, "the first rank of a stage that has the loss reads data"
            found = self._look_up(batches, selected.nonzero().tolist())
        found = handed_on(found, kinds, self._group, self._device)
        self._ids, self._log_probs, self._labels = (
            context_parallel_slice(found[name], *self._cp)
            for name in ("ids", "log_probs", "labels")
        )
        self._tokens = found["tokens"]

    def _look_up(
        self, batches: Sequence[MicroBatch], samples: Sequence[Sequence[int]]
    ) -> dict[str, torch.Tensor]:
        ids, log_probs, labels = self._answers.by_teacher[self.name]
        tokens = samples_of([batch["tokens"] for batch in batches], samples)
        assert tokens is not None, "samples are selected"
        return {
            "ids": torch.from_numpy(ids),
            "log_probs": torch.from_numpy(log_probs),
            "labels": torch.from_numpy(labels),
            "tokens": tokens.cpu().view(ids.shape[:2]),
        }

    def target(self, micro_batch: int) -> Target:
        """What it says about a micro-batch's k selected samples, ids ``[k, s/c, i]``."""
        said = self._at_one(self._of(micro_batch))
        if self._temperature == 1:
            return said
        return dataclasses.replace(
            said,
            log_probs=at_temperature(said.log_probs, self._temperature),
            temperature=self._temperature,
            unit_log_probs=said.log_probs,
        )

    def _at_one(self, rows: slice | torch.Tensor) -> Sparse:
        ids, log_probs, labels = self._ids[rows], self._log_probs[rows], self._labels[rows]
        return Sparse(ids.long(), log_probs, self._tail, label_log_probs=labels)

    def _readable(self, rows: slice | torch.Tensor) -> torch.Tensor:
        return self._ids[rows][..., 0] >= 0


def at_temperature(log_probs: torch.Tensor, temperature: float) -> torch.Tensor:
    """Of log-probabilities ``[..., i]`` at temperature 1 those of a softmax over the i ids at
    another; what other ids would have is not known. -inf stays."""
    tempered = log_probs / temperature
    total = tempered.logsumexp(-1, keepdim=True)
    return tempered - total.masked_fill(total == -torch.inf, 0)


def of_student(answer: Answer, vocab_size: int) -> Answer:
    """An answer about ids below ``vocab_size`` alone: what is left of the probability is the whole.

    Where all that is known lies outside, nothing is left to say.
    """
    outside = answer.ids >= vocab_size
    if not outside.any():
        return answer
    taken = np.exp(np.where(outside, answer.log_probs, -np.inf).astype(np.float64)).sum(1)
    ids = np.where(outside, -1, answer.ids)
    kept = np.where(ids >= 0, answer.log_probs, -np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = kept - np.log1p(-np.minimum(taken, 1))[:, None]
    kept = np.where(ids >= 0, np.minimum(kept, 0), -np.inf)
    order = np.argsort(-kept, 1, kind="stable")
    return Answer(
        np.take_along_axis(ids, order, 1), np.take_along_axis(kept, order, 1).astype(np.float32)
    )


def served_teacher(run: RunContext, info: TeacherInfo, student: BuiltStudent) -> ServedTeacher:
    """The servers as a teacher of a step on a rank of the last stage; no collective."""
    recipe, groups = run.recipe, student.groups
    spec = recipe.teachers[info.name]
    temperature, domains = 1.0, taught_by(recipe, info.name)
    if run.kind != EVALUATION and domains:  # which measures at 1, as the reference of pairs is
        temperature = recipe.temperature(domains[0])
    return ServedTeacher(
        info.name,
        run.need(AnswersOfStep),
        spec.server.top + 1,
        temperature=temperature,
        tail=spec.tail,
        share_group=groups.tp_cp,
        cp_group=groups.cp,
        device=student.device,
    )
