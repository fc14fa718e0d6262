"""Where Megatron's model hands over its hidden states before any logits exist.

``GPTModel.forward`` takes an ``output_processor`` that gets the states after the final norm and
returns the model's output. Stock scripts do not pass it, so a forward pre-hook on the chunk with
the output layer adds the one that is in force, and a wrapper to the plans that take the place of a
forward pass (``schedule_plan``). ``HybridModel.forward`` takes none yet: there ``hybrid_seam``
stands in. Without one, and where a forward pass has no labels, the output is stock's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_moe_inject.host.hybrid_seam import HybridTail, takes_output_processor
from megatron_moe_inject.host.megatron_types import Chunk
from megatron_moe_inject.host.schedule_plan import runs_by_plan
from megatron_moe_inject.host.uses import PLANNED_LOSS
from megatron_moe_inject.host.wrap import Call, wrap_method

OutputProcessor = Callable[..., torch.Tensor]
"""Megatron's ``output_processor``: gets by name ``hidden_states`` ``[s(/p under SP), b, h]``,
``output_layer``, ``output_weight``, ``labels`` and ``loss_mask`` ``[b, s]``, and ``config``."""


class LossSeam:
    """The seam of one bare model chunk with ``post_process``.

    Attributes:
        process: the output processor in force, ``None`` for stock's output.
        head_rows: whoever trains some rows of the output layer puts here what gives, for the
            micro-batch at hand, which of this rank's rows they are, ``[k]``, and their values
            ``[k, h]``, part of the graph; or ``None`` while the layer's own rows are in force.
        head_low_rank: likewise for a correction ``scale * b @ a`` of the layer: ``a [r, h]``,
            ``b [v/p, r]`` and ``scale``.
    """

    def __init__(self, chunk: Chunk) -> None:
        self.process: OutputProcessor | None = None
        self.head_rows: Callable[[], tuple[torch.Tensor, torch.Tensor] | None] | None = None
        self.head_low_rank: Callable[[], tuple[torch.Tensor, torch.Tensor, float] | None] | None = (
            None
        )
        if takes_output_processor(chunk):
            chunk.register_forward_pre_hook(self._add, with_kwargs=True)
        else:
            HybridTail(chunk, lambda: self.process)
        if runs_by_plan(chunk):
            wrap_method(chunk, PLANNED_LOSS, self._add_to_plan)

    @contextlib.contextmanager
    def using(self, process: OutputProcessor) -> Iterator[None]:
        """Inside the block this one is in force."""
        before, self.process = self.process, process
        try:
            yield
        finally:
            self.process = before

    def _add(self, chunk: Any, args: Any, kwargs: Any) -> Any:
        if self.process is None or kwargs.get("labels") is None:
            return None
        return args, kwargs | {"output_processor": self.process}

    def _add_to_plan(self, call: Call) -> Any:
        if self.process is None or call["labels"] is None:
            return call()
        return call(output_processor=self.process)
