"""The gradient boundary where schedule plans run the layers (``host.schedule_plan``).

Every node of a plan runs backward, whatever requires grad, and one without a graph cannot. So the
graph begins at the input of the boundary layer, and the nodes before it, of this pipeline stage and
of those before, are taken out of the backward. The last layer always runs one: its last node has
the final norm in it.

Between pipeline stages the schedule of these plans insists on a gradient for everything received.
A stage that has made none, below the boundary, sends zeros, which nobody reads: unlike without
plans (``pipeline.py``) the messages stay, and the backward passes are saved all the same.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_moe_inject.experts.train.boundary import refuse_offloading
from megatron_moe_inject.experts.train.uses import PLANNED_BOUNDARY
from megatron_moe_inject.host.megatron_types import Chunk
from megatron_moe_inject.host.model_parts import decoder_layers
from megatron_moe_inject.host.schedule_plan import layer_nodes, require_grad, run_backward_as
from megatron_moe_inject.host.wrap import Call, wrap_method


class PlannedBoundary:
    """Starts the backward graph of one model chunk at the boundary layer. No collective.

    Args:
        chunk: bare GPT model chunk, after ``requires_grad`` is set.
        boundary: the agreed position (``agree_boundary``).

    Raises:
        RecipeError: there are layers below the boundary, and Megatron offloads activations.
    """

    def __init__(self, chunk: Chunk, boundary: int) -> None:
        if boundary > 0:
            refuse_offloading(chunk.config, boundary)
        layers = decoder_layers(chunk)
        below = boundary - (layers[0].layer_number - 1) if layers else 0
        most = len(layers) - (chunk.decoder.final_layernorm is not None)
        self._below = max(0, min(below, most))
        self._embeds = chunk.pre_process
        if boundary >= 0 and (self._embeds or self._below):
            wrap_method(chunk, PLANNED_BOUNDARY, self._plan)

    def _plan(self, call: Call) -> Any:
        plan = call()
        run_backward_as(plan.pre_process, _nothing if self._embeds else _zeros)
        for layer in range(self._below):
            for node in layer_nodes(plan, layer):
                run_backward_as(node, _nothing)
        if self._below:
            require_grad(plan, 0, False)
        if self._below < plan.num_layers():
            require_grad(plan, self._below, True)
        return plan


def _nothing(outputs: tuple, gradients: tuple) -> tuple:
    """A backward that makes no gradient."""
    return ()


def _zeros(outputs: tuple[torch.Tensor, ...], gradients: tuple) -> tuple:
    """A backward that gives what was received, ``[s, b, h]``, a gradient to send."""
    outputs[0].grad = torch.zeros_like(outputs[0])
    return ()
