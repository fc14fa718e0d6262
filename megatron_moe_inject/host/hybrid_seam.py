"""The loss seam of a ``HybridModel`` whose ``forward`` takes no ``output_processor``.

The end of that forward is ``output_layer(states)``, then ``compute_language_model_loss(labels,
logits)``. Both are wrapped on the instance: the first keeps the states and forms no logits, the
second gives what the output processor makes of them. Multi-token prediction calls the same two
before, once for each depth; those calls are left alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from megatron_moe_inject.host.megatron_types import Chunk
from megatron_moe_inject.host.uses import HYBRID_LOSS, OUTPUT_LAYER
from megatron_moe_inject.host.wrap import Call, wrap_method


def takes_output_processor(chunk: Chunk) -> bool:
    """Whether the model's forward takes an ``output_processor`` (``GPTModel``'s does)."""
    return "output_processor" in inspect.signature(type(chunk).forward).parameters


class HybridTail:
    """The last two calls of one bare model chunk's forward pass.

    Args:
        chunk: with ``post_process``.
        process: gives the output processor in force, ``None`` for stock's output.
    """

    def __init__(self, chunk: Chunk, process: Callable[[], Callable | None]) -> None:
        self._chunk = chunk
        self._process = process
        self._depths_left: int | None = None
        self._states: dict[str, Any] | None = None
        self._loss_mask: torch.Tensor | None = None
        chunk.register_forward_pre_hook(self._begin, with_kwargs=True)
        wrap_method(chunk.output_layer, OUTPUT_LAYER, self._keep_states)
        wrap_method(chunk, HYBRID_LOSS, self._loss)

    def _begin(self, chunk: Any, args: Any, kwargs: Any) -> None:
        """Count anew: a forward pass without labels, or without a processor, stays as it is."""
        self._states = self._depths_left = None
        if self._process() is None or kwargs.get("labels") is None:
            return
        predicts = chunk.mtp_process and kwargs.get("compute_mtp_loss", True)
        self._depths_left = chunk.config.mtp_num_layers or 0 if predicts else 0
        self._loss_mask = kwargs.get("loss_mask")

    def _keep_states(self, call: Call) -> Any:
        """The output layer; in the place of the last logits of a forward pass an empty tensor."""
        if self._depths_left is None:
            return call()
        if self._depths_left > 0:
            self._depths_left -= 1
            return call()
        self._depths_left = None
        self._states = {"hidden_states": call["input_"], "output_weight": call["weight"]}
        return call["input_"].new_empty(0), None

    def _loss(self, call: Call) -> Any:
        """The loss of the states that were kept; stock's of logits."""
        if self._states is None:
            return call()
        states, self._states = self._states, None
        loss_mask, self._loss_mask = self._loss_mask, None
        process = self._process()
        assert process is not None, "the output processor went while the model ran"
        return process(
            **states,
            output_layer=self._chunk.output_layer,
            labels=call["labels"],
            loss_mask=loss_mask,
            config=self._chunk.config,
        )
