"""Forward-only passes beside a step's own, by Megatron's schedules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from megatron_moe_inject.host.megatron_types import Chunk


def allowed_rounds(least: int, stages: int, group: int) -> int:
    """The smallest number of micro-batches, from ``least`` on, that Megatron's schedules take.

    An interleaved one wants at least one whole group, and of the last group nothing or at least as
    many as there are stages. So the number is no larger than that of the step's micro-batches.
    """
    rounds = max(least, group)
    return rounds + max(0, stages - rounds % group) if rounds % group else rounds


@contextlib.contextmanager
def evaluating(chunks: Sequence[Chunk]) -> Iterator[None]:
    """Chunks in eval mode: no expert-bias counts, no dropout, no auxiliary losses."""
    training = [chunk.training for chunk in chunks]
    try:
        for chunk in chunks:
            chunk.eval()
        yield
    finally:
        for chunk, mode in zip(chunks, training, strict=True):
            chunk.train(mode)
