"""Steps as the step hook would make them, for parts that are tested alone."""

import torch

from megatron_moe_inject.host.step import MicroBatch, Step


def step_of(
    batches: list[MicroBatch] | None = None,
    *,
    labels: torch.Tensor | None = None,
    iteration: int = 0,
    sequence_length: int = 4,
    training: bool = True,
) -> Step:
    """A step of one model chunk whose schedule does nothing."""
    labels = torch.zeros(1, 1, dtype=torch.int64) if labels is None else labels
    return Step(
        labels,
        [batches],
        iteration,
        sequence_length,
        training,
        lambda **_: [],
        lambda *_: None,
        as_read=batches,
    )
