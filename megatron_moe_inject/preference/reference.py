"""What pairs of answers are measured against: the original model, or a teacher.

Shapes: n micro-batches, b samples each, s sequence, c context-parallel size, k samples with answers
on this rank.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_moe_inject.host.labels import PREFERENCE
from megatron_moe_inject.host.step import Step
from megatron_moe_inject.losses.preference import answer_log_probs
from megatron_moe_inject.losses.rows import RowKernels
from megatron_moe_inject.losses.student import Student, Vocabulary
from megatron_moe_inject.losses.target import Dense, Sparse, Target
from megatron_moe_inject.preference.answers import NO_ANSWERS, AnswerReader
from megatron_moe_inject.retention.original_pass import OriginalPass
from megatron_moe_inject.teachers.step_teachers import StepTeachers


class OriginalReference:
    """The original model as reference, on every stage.

    Args:
        original: runs it.
        reader: reads its answers, on the last stage; ``None`` elsewhere.
    """

    def __init__(self, original: OriginalPass, reader: AnswerReader | None) -> None:
        self._original = original
        self._reader = reader
        original.reader = self._read

    def _read(self, *rows_and_size: Any, **seen: Any) -> None:
        if self._reader is not None:
            self._reader.read(*rows_and_size, **seen)

    def log_probs(self, step: Step) -> torch.Tensor:
        """Of the labels of a step that has begun its teachers, ``[s/c, k]``; nothing on other
        stages than the last.

        Collectives: those of the original model's pass, unless it has run with the teachers.
        """
        if not self._original.holds:
            self._original.run(step)
            self._original.close()
        return NO_ANSWERS.log_probs if self._reader is None else self._reader.taken().log_probs


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

    def log_probs(self, step: Step, labels: torch.Tensor) -> torch.Tensor:
        """Of labels ``[s/c, k]``, those of a whole step.

        Collectives: those of ``answer_log_probs``.
        """
        wanted = step.labels == PREFERENCE
        teacher = self._teachers.reference
        assert teacher is not None, "the last stage has the reference"
        if not wanted.any():
            return NO_ANSWERS.log_probs
        _, target = teacher.of_step(wanted)
        return self._of_target(target, labels)

    def of_micro_batch(self, micro_batch: int, labels: torch.Tensor) -> torch.Tensor:
        """Of labels ``[s/c, b]`` of a micro-batch of answers alone; asked once each, in order.

        Collectives: those of ``answer_log_probs``, and of the teacher's windows.
        """
        teacher = self._teachers.reference
        assert teacher is not None, "the last stage has the reference"
        return self._of_target(teacher.target(micro_batch), labels)

    @torch.no_grad()
    def _of_target(self, target: Target, labels: torch.Tensor) -> torch.Tensor:
        if isinstance(target, Sparse):
            assert target.label_log_probs is not None, "checked: servers, which tell the text's"
            told = target.label_log_probs.squeeze(-1).t().double()
            return torch.where(labels >= 0, told, 0.0)
        assert isinstance(target, Dense), "checked: another one runs a model"
        hidden = target.hidden.transpose(0, 1)
        student = Student(hidden, target.head, labels, self._vocabulary, target.transform)
        return answer_log_probs(student, self._kernels)
