"""Which micro-batch a model chunk is working on.

Micro-batches reach a chunk in order in every schedule. Inside the chunk's own forward pass the
current one is known by counting; what runs outside it is a recomputation during the backward
pass. Under activation recompute a place is passed twice, first without a graph and then, during the
backward pass, with one; the micro-batches of the first passage wait in a queue for the second.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from megatron_moe_inject.host.megatron_types import Chunk


class ChunkClock:
    """Counts the forward passes of one bare model chunk.

    Attributes:
        micro_batch: 0-based index of the current or last forward pass since ``reset``.
        inside: whether the chunk's forward pass is under way.
    """

    def __init__(self, chunk: Chunk) -> None:
        self.micro_batch = -1
        self.inside = False
        chunk.register_forward_pre_hook(self._enter)
        chunk.register_forward_hook(self._leave)

    def reset(self) -> None:
        """Start a step."""
        self.micro_batch, self.inside = -1, False

    def _enter(self, *_: Any) -> None:
        self.micro_batch, self.inside = self.micro_batch + 1, True

    def _leave(self, *_: Any) -> None:
        self.inside = False


class Passages:
    """Tells a place inside a chunk which micro-batch passes it.

    Args:
        clock: the chunk's.
    """

    def __init__(self, clock: ChunkClock) -> None:
        self._clock = clock
        self._waiting: deque[int] = deque()

    def reset(self) -> None:
        """Start a step."""
        self._waiting.clear()

    def passing(self) -> tuple[int, bool]:
        """The micro-batch that passes now, and whether for the first time."""
        if not self._clock.inside:
            return self._waiting.popleft(), False
        if not torch.is_grad_enabled():
            self._waiting.append(self._clock.micro_batch)
        return self._clock.micro_batch, True
