"""Served teachers with a tokenizer of their own: texts of their own ids, and what servers say.

Of a text that is sent as the teacher's ids the servers give the log-probability of each id, and no
others. The rank that asks has read the step's samples for that already (``step_answers``), so that
in the step's teacher it hands out what it has: what was read over gloo, as every rank that reads
data does, and 4 bytes for each token that the teacher reads to the TP x CP ranks.

Shapes: r texts, t tokens of all texts that are predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_moe_inject.host.step import MicroBatch
from megatron_moe_inject.host.to_device import to_device
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext
from megatron_moe_inject.recipe.schema import TeacherSpec
from megatron_moe_inject.teachers import vocabulary
from megatron_moe_inject.teachers.align.reading import Reading
from megatron_moe_inject.teachers.align.samples import SampleReader
from megatron_moe_inject.teachers.align.scores import Scores
from megatron_moe_inject.teachers.align.start import (
    sample_reader,
    student_tokenizer,
    teacher_tokenizer,
    tokenizer_path,
    told_of,
)
from megatron_moe_inject.teachers.align.step_teacher import AlignedTeacher
from megatron_moe_inject.teachers.base import Comparison, TeacherInfo
from megatron_moe_inject.teachers.prefix import resolved_prefix
from megatron_moe_inject.teachers.served.pool import log_probs_of_text
from megatron_moe_inject.teachers.served.protocols import Answer
from megatron_moe_inject.teachers.served.step_teacher import AnswersOfStep
from megatron_moe_inject.teachers.sources import parse_source


def texts_to_ask(reading: Reading) -> list[np.ndarray]:
    """The r texts of a reading as ids, each with the label behind its last token."""
    ends = np.cumsum(reading.lengths)
    return [
        np.append(reading.inputs[end - length : end], reading.labels[end - 1]).astype(np.int32)
        for length, end in zip(reading.lengths.tolist(), ends.tolist(), strict=True)
    ]


def scores_of(texts: Sequence[np.ndarray], answers: Sequence[Answer]) -> np.ndarray:
    """Log-probabilities [t] float32 of the labels of texts, as ``scores.Scores`` has them."""
    own = [log_probs_of_text(answer, text) for text, answer in zip(texts, answers, strict=True)]
    return np.concatenate([np.zeros(0, np.float32), *own]).astype(np.float32)


class ServedScores(Scores):
    """What the servers of a teacher have said of the texts of a step.

    Args:
        name: of the teacher.
        answers: of the step; asked on the first rank of ``share_group`` alone.
        share_group: the TP x CP ranks that share a sequence.
        device: where scores are wanted.
    """

    def __init__(
        self,
        name: str,
        answers: AnswersOfStep,
        share_group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self._name = name
        self._answers = answers
        self._group = share_group
        self._device = device

    def __call__(self, reading: Reading, most: int) -> torch.Tensor:
        """See ``Scores``. Collectives: one broadcast of t numbers over the TP x CP ranks; none of
        one rank, or of no text."""
        if not len(reading.lengths):
            return torch.zeros(0, device=self._device)
        if self._group.rank() == 0:
            said = torch.from_numpy(self._answers.of_texts[self._name][1])
            scores = to_device(said.float(), self._device)
        else:
            scores = torch.empty(len(reading.labels), device=self._device)
        if self._group.size() > 1:
            first = dist.get_process_group_ranks(self._group)[0]
            dist.broadcast(scores, src=first, group=self._group)
        return scores


class _Asked:
    """Of the step's samples what was read when servers were asked; on the rank that asks."""

    def __init__(self, name: str, answers: AnswersOfStep) -> None:
        self._name = name
        self._answers = answers

    def __call__(
        self,
        batches: Sequence[MicroBatch],
        selected: torch.Tensor,
        length: int,
        starts: torch.Tensor | None,
    ) -> Reading:
        """See ``samples.Reads``."""
        return self._answers.of_texts[self._name][0]


def check_served(name: str, spec: TeacherSpec, flags: vocabulary.TokenizerFlags) -> TeacherInfo:
    """What can be said before anything is asked; as ``Alignment.check``.

    Raises:
        RecipeError: a tokenizer of either side that gives no bytes back, or a prefix that the
            teacher's does not have.
    """
    source = parse_source(name, spec.source)
    path = tokenizer_path(source, spec)
    teacher = teacher_tokenizer(source, path)
    assert path is not None, "a tokenizer was read there"
    own = vocabulary.vocabulary_of_files(path, origin=source.text, rows=None)
    rows = len(teacher.pieces)
    prefix, prefix_told = resolved_prefix(source, spec.prefix, files=path, ids=own.ids, rows=rows)
    told = told_of(student_tokenizer(name, flags), teacher, rows)
    return TeacherInfo(
        name=name,
        source=source.text,
        kind=source.kind,
        path=str(Path()),
        architecture=f"served at {spec.path}",
        num_layers=0,
        hidden_size=0,
        vocab_rows=rows,
        vocab_size=rows,
        parameters=0,
        max_positions=None,
        vocabulary=told,
        shared=Comparison(told),
        prefix=prefix,
        prefix_told=prefix_told,
        aligned=True,
    )


def reader_of(run: RunContext, info: TeacherInfo, longest: int | None) -> SampleReader:
    """What reads samples as a served teacher does.

    Args:
        longest: ids of a text that its servers take; None without limit.
    """
    source, spec = parse_source(info.name, info.source), run.recipe.teachers[info.name]
    teacher = teacher_tokenizer(source, tokenizer_path(source, spec))
    return sample_reader(run, info, teacher, None if longest is None else longest - 1)


def served_teacher(
    run: RunContext, info: TeacherInfo, student: BuiltStudent, host_group: dist.ProcessGroup | None
) -> AlignedTeacher:
    """The servers as a teacher of a step on a rank of the last stage; no collective."""
    groups, answers = student.groups, run.need(AnswersOfStep)
    asks = groups.tp_cp.rank() == 0
    return AlignedTeacher(
        info.name,
        _Asked(info.name, answers) if asks else reader_of(run, info, answers.longest[info.name]),
        ServedScores(info.name, answers, groups.tp_cp, student.device),
        tp_group=groups.tp,
        host_group=host_group,
        cp_group=groups.cp,
        device=student.device,
    )
