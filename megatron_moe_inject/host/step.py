"""One step of training or evaluation, and what takes part in it.

The step hook (``megatron_moe_inject.step``) makes a ``Step`` of what Megatron hands to its
schedule, begins all parts in their order, runs the schedule and ends all parts in the same order.

Shapes: n micro-batches, b samples each, s sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

MicroBatch = dict[str, Any]
"""What a data iterator yields, by Megatron's names: ``tokens``, ``labels``, ``loss_mask`` ..."""


@dataclass
class Step:
    """What its parts may know of a step, and change of it before the schedule runs.

    Attributes:
        labels: ``[n, b]`` int64 on the host, domain index or ``GENERAL`` of every sample.
        batches: by model chunk, the micro-batches without what stock code must not see; ``None``
            on chunks and ranks that read no data.
        iteration: optimizer steps taken so far.
        sequence_length: s, whole sequences.
        training: whether gradients are wanted.
        schedule: Megatron's forward-backward function.
        forward_step: the script's forward step; a part may wrap it.
        arguments: what the schedule gets besides; a part may add to it.
        loss_mask: ``[n, b, s]`` bool on the host, tokens whose loss counts; ``None`` where all do,
            and where no part ``reads_tokens``.
        as_read: ``micro_batches`` with all that the data has, such as ``dataset_id``.
        starts: ``[n, b, s]`` bool on the host, where documents begin; ``None`` where samples are
            not packed, and where no part ``reads_tokens``.
        before: what was ``as_read`` where a part has written over samples; else ``None``.
    """

    labels: torch.Tensor
    batches: Sequence[list[MicroBatch] | None]
    iteration: int
    sequence_length: int
    training: bool
    schedule: Callable[..., Any]
    forward_step: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    loss_mask: torch.Tensor | None = None
    as_read: list[MicroBatch] | None = None
    starts: torch.Tensor | None = None
    before: list[MicroBatch] | None = None

    @property
    def micro_batches(self) -> list[MicroBatch] | None:
        """The n micro-batches from whichever model chunk reads data; ``None`` where none does."""
        return next((chunk for chunk in self.batches if chunk is not None), None)


class StepPart:
    """What takes part in steps on this rank; each method does nothing unless overridden.

    Every rank has the same parts in the same order, so a part may run collectives in ``begin`` and
    ``end``, which say which.

    Attributes:
        reads_tokens: whether it reads ``Step.loss_mask`` or ``Step.starts``, which are sent to
            every rank where a part does.
    """

    reads_tokens = False

    def rewrite(self, step: Step) -> None:
        """Before anything of the step is looked at but labels: it may write over samples, in
        ``batches`` of every chunk and ``as_read``."""

    def begin(self, step: Step) -> None:
        """Before the schedule, in the order of the parts."""

    def failed(self, error: Exception) -> None:
        """The schedule ended in an error, which is raised again; notes may be added to it."""

    def close(self) -> None:
        """After the schedule, also after one that failed."""

    def end(self, step: Step, reports: Any) -> None:
        """After the schedule, in the order of the parts.

        Args:
            reports: what the schedule returned: on the last stage one dictionary per micro-batch.
        """
