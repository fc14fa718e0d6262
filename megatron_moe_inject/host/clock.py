"""Which micro-batch a model chunk is working on.

Micro-batches reach a chunk in order in every schedule. Inside the chunk's own forward pass the
current one is known by counting; what runs outside it is a recomputation during the backward
pass. Under activation recompute a place is passed twice, first without a graph and then, during the
backward pass, with one; the micro-batches of the first passage wait in a queue for the second.

Where a schedule plan takes the place of the forward pass (``schedule_plan``), plans are made in the
order of the micro-batches, and each node of a plan is inside while it runs.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_moe_inject.host.megatron_types import Chunk
from megatron_moe_inject.host.schedule_plan import layer_nodes, runs_by_plan
from megatron_moe_inject.host.uses import PLANNED_CLOCK
from megatron_moe_inject.host.wrap import Call, wrap_method


class ChunkClock:
    """Counts the forward passes of one bare model chunk.

    Attributes:
        micro_batch: 0-based index of the current or last forward pass since ``reset``.
        inside: whether the chunk's forward pass is under way.
    """

    def __init__(self, chunk: Chunk) -> None:
        self.micro_batch = -1
        self.inside = False
        self._planned = -1
        chunk.register_forward_pre_hook(self._enter)
        chunk.register_forward_hook(self._leave)
        if runs_by_plan(chunk):
            wrap_method(chunk, PLANNED_CLOCK, self._plan)

    def reset(self) -> None:
        """Start a step."""
        self.micro_batch, self.inside, self._planned = -1, False, -1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block forward passes are not counted."""
        before = self.micro_batch, self.inside, self._planned
        try:
            yield
        finally:
            self.micro_batch, self.inside, self._planned = before

    def _enter(self, *_: Any) -> None:
        self.micro_batch, self.inside = self.micro_batch + 1, True

    def _leave(self, *_: Any) -> None:
        self.inside = False

    def _plan(self, call: Call) -> Any:
        plan = call()
        self._planned += 1
        for layer in range(plan.num_layers()):
            for node in layer_nodes(plan, layer):
                run = functools.partial(self._in_node, self._planned, node.submodule)
                node.submodule = run
        return plan

    def _in_node(self, micro_batch: int, submodule: Callable, *args: Any) -> Any:
        self.micro_batch, self.inside = micro_batch, True
        try:
            return submodule(*args)
        finally:
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
