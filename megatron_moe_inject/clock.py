"""Which micro-batch a model chunk is working on.

Micro-batches reach a chunk in order in every schedule. Inside the chunk's own forward pass the
current one is known by counting; what runs outside it is a recomputation during the backward
pass.
"""

from __future__ import annotations

from typing import Any

import torch


class ChunkClock:
    """Counts the forward passes of one bare model chunk.

    Attributes:
        micro_batch: 0-based index of the current or last forward pass since ``reset``.
        inside: whether the chunk's forward pass is under way.
    """

    def __init__(self, chunk: torch.nn.Module) -> None:
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
