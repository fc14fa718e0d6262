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

from megatron_moe_inject.experts.train.boundary import refuse_offloading
from megatron_moe_inject.experts.train.uses import PLANNED_BOUNDARY
from megatron_moe_inject.host.megatron_types import Chunk
from megatron_moe_inject.host.model_parts import decoder_layers
from megatron_moe_inject.host.schedule_plan import (
    first_node,
    give_zeros,
    layer_nodes,
    require_grad,
    skip_backward,
)
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
        if self._embeds:
            skip_backward(plan.pre_process)
        for layer in range(self._below):
            for node in layer_nodes(plan, layer):
                skip_backward(node)
        if self._below and not self._embeds:
            received = first_node(plan, 0)
            require_grad(received, False)
            give_zeros(received)
        if self._below < plan.num_layers():
            require_grad(first_node(plan, self._below), True)
        return plan
