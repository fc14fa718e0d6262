"""Has the answers of servers ready when a step begins, and lets training end where they fail.

On each data-parallel place the first rank of the last stage asks. It begins before any other part
of the step, so that when servers fail nothing of the step has changed anything, and the training
state is that after the step before. All ranks agree on that over gloo, on the host: the others wait
there, and no collective of a device waits with them, while a server is asked again and again.

Shapes: n micro-batches, b samples each, k samples of a step, s sequence, i ids of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_moe_inject.data import packed
from megatron_moe_inject.data.labels import domains_of, samples_of
from megatron_moe_inject.host.agreement import HostWorld
from megatron_moe_inject.host.attached_loss import add_reports
from megatron_moe_inject.host.errors import Failure
from megatron_moe_inject.host.leave import CannotGoOn
from megatron_moe_inject.host.step import MicroBatch, Step, StepPart
from megatron_moe_inject.host.to_device import to_device
from megatron_moe_inject.teachers.align.reading import Reading, nothing_read
from megatron_moe_inject.teachers.align.samples import Reads
from megatron_moe_inject.teachers.served.ahead import Ahead
from megatron_moe_inject.teachers.served.answers import Answers, ServerFailure
from megatron_moe_inject.teachers.served.chunks import scores_of, texts_to_ask
from megatron_moe_inject.teachers.served.pool import log_probs_of_text
from megatron_moe_inject.teachers.served.step_teacher import AnswersOfStep, of_student
from megatron_moe_inject.teachers.served.texts import Text, texts_of


@dataclass(frozen=True)
class Asked:
    """A served teacher on the rank that asks.

    Attributes:
        answers: asks its servers.
        domains: indices of those that it teaches.
        slots: i.
        ahead: steps whose texts are asked for ahead.
        failure: makes the error that names it.
        reads: of one with a tokenizer of its own what makes its texts; None of another.
    """

    answers: Answers
    domains: Sequence[int]
    slots: int
    ahead: int
    failure: Failure
    reads: Reads | None = None


class StepAnswers(StepPart):
    """Fetches what served teachers say of a step.

    Args:
        asked: by name the teachers that this rank asks; empty on ranks that ask none.
        world: all ranks.
        answers: where what was fetched is left.
        entries: domain index or ``GENERAL`` of each entry of the training blend.
        vocab_size: ids of the student.
        is_packed: whether samples are packed with documents.
        device: where the student is.
    """

    def __init__(
        self,
        asked: Mapping[str, Asked],
        world: HostWorld,
        answers: AnswersOfStep,
        *,
        entries: Sequence[int],
        vocab_size: int,
        is_packed: bool,
        device: torch.device,
    ) -> None:
        self.reads_tokens = is_packed
        self._asked = asked
        self._world = world
        self._answers = answers
        self._entries = entries
        self._vocab_size = vocab_size
        self._packed = is_packed
        self._device = device
        self.coming = Ahead(
            self._texts_of_batch,
            self._each("hint"),
            self._each("forget"),
            masked=any(teacher.reads is not None for teacher in asked.values()),
        )
        self._steps_ahead = max((teacher.ahead for teacher in asked.values()), default=0)

    def begin(self, step: Step) -> None:
        """Fetch the step's answers.

        Collectives: over the whole world on the host one all-reduce of four numbers; one broadcast
        of a message where servers have failed.

        Raises:
            CannotGoOn: on every rank: servers have failed, and what was done for it.
        """
        problem = None
        if self._asked:
            assert step.as_read is not None, "the first rank of a stage that has the loss reads"
            if step.training:
                self._foresee(step)
            problem = self._fetch(step)
        rank, world = dist.get_rank(), dist.get_world_size()
        counts = [teacher.answers.counts for teacher in self._asked.values()]
        first, *told = self._world.largest(
            [
                0.0 if problem is None else world - rank,
                sum(count.waited for count in counts),
                sum(count.missed for count in counts),
                -sum(t.answers.ready for t in self._asked.values()) if self._asked else -np.inf,
            ]
        )
        for count in counts:
            count.waited, count.missed, count.texts = 0.0, 0, 0
        if first:
            raise CannotGoOn(self._world.said_by(world - int(first), problem))
        self._told = told

    def end(self, step: Step, reports: Any) -> None:
        """Ask ahead, and report how it went. No collective."""
        if not step.training:
            return
        if self._steps_ahead:  # of the step that begins next, which then has so many more
            self.coming.reach((1 + self._steps_ahead) * len(step.labels))
        waited, missed, ready = self._told
        names = {"server wait": waited, "server misses": missed, "server ahead": -ready}
        values = torch.tensor([[value, 1.0] for value in names.values()])
        values = to_device(values, self._device)
        add_reports(reports, dict(zip(names, values, strict=True)))

    def _foresee(self, step: Step) -> None:
        assert step.as_read is not None, "of this rank"
        if not self.coming.any:  # at first, and after a loader that was not foreseen
            self.coming.reach((1 + self._steps_ahead) * len(step.labels))
        self.coming.came(step.before or step.as_read)

    def _fetch(self, step: Step) -> str | None:
        """Leave the step's answers where teachers take them; why they cannot be had."""
        for name, teacher in self._asked.items():
            try:
                if teacher.reads is None:
                    self._answers.by_teacher[name] = self._fetched(step, teacher)
                else:
                    self._answers.of_texts[name] = self._read(step, teacher, teacher.reads)
            except ServerFailure as failure:
                return str(
                    teacher.failure(
                        f"no longer says what is needed: {failure}",
                        "see to the servers, and go on from the checkpoint",
                    )
                )
        return None

    def _fetched(self, step: Step, teacher: Asked) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the samples that a teacher teaches; see ``AnswersOfStep``."""
        assert step.as_read is not None, "of this rank"
        wanted = torch.isin(step.labels, torch.tensor(list(teacher.domains)))
        samples = wanted.nonzero().tolist()
        shape = (len(samples), step.sequence_length, teacher.slots)
        ids = np.full(shape, -1, np.int32)
        log_probs = np.full(shape, -np.inf, np.float32)
        labels = np.full((*shape[:2], 1), -np.inf, np.float32)
        starts = None if step.starts is None else step.starts[wanted]
        texts = _texts(step.as_read, samples, starts)
        fetched = teacher.answers.fetch([text.tokens for text in texts])
        for text, answer in zip(texts, fetched, strict=True):
            own = of_student(answer, self._vocab_size)
            ids[text.sample, text.rows] = own.ids
            log_probs[text.sample, text.rows] = own.log_probs
            labels[text.sample, text.rows, 0] = log_probs_of_text(own, text.tokens)
        return ids, log_probs, labels

    def _read(self, step: Step, teacher: Asked, reads: Reads) -> tuple[Reading, np.ndarray]:
        """Of a teacher with a tokenizer of its own; see ``AnswersOfStep``."""
        assert step.as_read is not None, "of this rank"
        wanted = torch.isin(step.labels, torch.tensor(list(teacher.domains)))
        reading = nothing_read(step.sequence_length)
        if wanted.any():
            reading = reads(step.as_read, wanted, step.sequence_length, step.starts)
        texts = texts_to_ask(reading)
        return reading, scores_of(texts, teacher.answers.fetch(texts))

    def _texts_of_batch(self, batch: MicroBatch) -> dict[str, list[np.ndarray]]:
        """The texts that a micro-batch asks for, by teacher."""
        shape = tuple(torch.as_tensor(batch["tokens"]).shape)
        labels = domains_of([batch], self._entries, shape[0])
        found = {}
        for name, teacher in self._asked.items():
            wanted = torch.isin(labels, torch.tensor(list(teacher.domains)))
            starts = packed.starts(batch, shape) if self._packed else None
            if teacher.reads is not None:
                begins = None if starts is None else starts[None]
                reading = nothing_read(shape[1])
                if wanted.any():
                    reading = teacher.reads([batch], wanted, shape[1], begins)
                found[name] = texts_to_ask(reading)
                continue
            begins = None if starts is None else starts[wanted[0]]
            texts = _texts([batch], wanted.nonzero().tolist(), begins)
            found[name] = [text.tokens for text in texts]
        return found

    def _each(self, what: str) -> Callable[[Mapping[str, Sequence[np.ndarray]]], None]:
        def told(texts: Mapping[str, Sequence[np.ndarray]]) -> None:
            for name, own in texts.items():
                getattr(self._asked[name].answers, what)(own)

        return told


def _texts(
    batches: Sequence[MicroBatch], samples: Sequence[Sequence[int]], starts: torch.Tensor | None
) -> list[Text]:
    """The texts of some samples of micro-batches, whose documents begin at ``starts`` [k, s]."""
    tokens = samples_of([batch["tokens"] for batch in batches], samples)
    labels = samples_of([batch["labels"] for batch in batches], samples)
    if tokens is None or labels is None:
        return []
    lengths = None if starts is None else packed.document_lengths(starts)
    return texts_of(tokens.cpu().numpy(), labels.cpu().numpy(), lengths)
