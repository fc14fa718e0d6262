"""How likely a teacher finds the tokens of texts that are its own ids.

This is all that alignment needs of a teacher (``Scores``). A model gives it here by its forward
passes; a server or a store that gives log-probabilities of a text's own tokens would do as well.

Shapes: r texts, t tokens of all texts, h_t teacher hidden.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist

from megatron_moe_inject.host.to_device import to_device
from megatron_moe_inject.losses.fused import FusedOptions, label_margins
from megatron_moe_inject.losses.rows import RowKernels
from megatron_moe_inject.losses.student import Student
from megatron_moe_inject.losses.triton_rows import AUTO
from megatron_moe_inject.teachers.align.reading import Reading
from megatron_moe_inject.teachers.base import Teacher
from megatron_moe_inject.teachers.documents import document_values


class Scores(Protocol):
    """Says how likely a teacher finds texts."""

    def __call__(self, reading: Reading, most: int) -> torch.Tensor:
        """log P(label | all before it in its text), ``[t]`` float32, on every rank that asks.

        Args:
            reading: the same on every rank. Also one without a text is asked about, in every step:
                other ranks that run the teacher may have some.
            most: tokens of one pass; a longer text has one of its own.
        """
        ...


class ModelScores(Scores):
    """Of a model that each of some ranks holds; they share the texts.

    Args:
        teacher: reads ids as they are, without a prefix of its own.
        group: ranks that share the work; None for this rank alone.
        device: where the model is.
        kernels: see ``losses.FusedOptions``.
    """

    def __init__(
        self,
        teacher: Teacher,
        group: dist.ProcessGroup | None,
        device: torch.device,
        kernels: RowKernels | str | None = AUTO,
    ) -> None:
        self._teacher = teacher
        self._head = teacher.head_weight(0, teacher.vocab_size)
        self._group = group
        self._device = device
        self._options = FusedOptions(kernels=kernels)

    def __call__(self, reading: Reading, most: int) -> torch.Tensor:
        """See ``Scores``. Collectives: those of ``documents.document_values``."""
        inputs, labels = (
            to_device(torch.from_numpy(ids), self._device).long()
            for ids in (reading.inputs, reading.labels)
        )
        return document_values(
            self._teacher,
            inputs,
            reading.lengths.tolist(),
            lambda states, places: self._log_probs(states, labels[places]),
            group=self._group,
            max_tokens=most,
        )

    @torch.no_grad()
    def _log_probs(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        transform = self._teacher.logit_transform
        text = Student(states, self._head, labels, transform=transform)
        margins = label_margins(text, self._options)
        return torch.nn.functional.logsigmoid(margins).float()
