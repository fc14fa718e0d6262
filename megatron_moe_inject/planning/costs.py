"""What parts of a step cost, as numbers: one micro-batch in a chunk, and a step's teachers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChunkCost:
    """One micro-batch in one model chunk.

    Attributes:
        kept: bytes that stay from its forward pass to its backward pass.
        saved: of these, what autograd saved.
        forward_peak: the most that is allocated in its forward pass.
        backward_peak: the same of its backward pass, what was kept included.
        loss: of ``kept`` and the peaks, what the loss takes beside the states at the model's end.
        forward_flops, backward_flops: operations; recomputed forwards count as backward.
        received: bytes of the states that a stage hands to the next.
    """

    kept: int = 0
    saved: int = 0
    forward_peak: int = 0
    backward_peak: int = 0
    loss: int = 0
    forward_flops: float = 0.0
    backward_flops: float = 0.0
    received: int = 0


@dataclass(frozen=True)
class TeacherCost:
    """Of all teachers together, on each rank of one pipeline stage.

    Attributes:
        weights: bytes of their parameters.
        states: bytes of the states of a step (or a window) that are kept.
        working: bytes of forward passes, before the student's.
        flops: of the forward passes that the rank runs in a step.
    """

    weights: int = 0
    states: int = 0
    working: int = 0
    flops: float = 0.0
