"""The gradient boundary where schedule plans run the layers (``host.schedule_plan``).

Every node of a plan runs backward, whatever requires grad, and one without a graph cannot. So the
graph begins at the input of the boundary layer, and the nodes before it are taken out of the
backward. The last layer always runs backward: its last node has the final norm in it.

Between pipeline stages the schedule of these plans insists on a gradient for everything received,
so with several stages the graph begins at the first layer: what lies below the boundary then
runs a backward that ends in nothing, at the cost of about a forward pass of these layers.
"""

from __future__ import annotations

from typing import Any

from megatron_moe_inject.experts.train.boundary import refuse_offloading
from megatron_moe_inject.experts.train.uses import PLANNED_BOUNDARY
from megatron_moe_inject.host.megatron_types import Chunk
from megatron_moe_inject.host.model_parts import decoder_layers
from megatron_moe_inject.host.schedule_plan import begin_graph, layer_nodes, skip_backward
from megatron_moe_inject.host.wrap import Call, wrap_method


class PlannedBoundary:
    """Starts the backward graph of the chunk with the embedding. No collective.

    Args:
        chunk: bare GPT model chunk, after ``requires_grad`` is set.
        boundary: the agreed position (``agree_boundary``).
        stages: pipeline stages.

    Raises:
        RecipeError: there are layers below the boundary, and Megatron offloads activations.
    """

    def __init__(self, chunk: Chunk, boundary: int, stages: int) -> None:
        if boundary < 0 or not chunk.pre_process:
            return
        self._below = 0
        if stages == 1:
            self._below = max(0, min(boundary, len(decoder_layers(chunk)) - 1))
        if self._below:
            refuse_offloading(chunk.config, self._below)
        wrap_method(chunk, PLANNED_BOUNDARY, self._plan)

    def _plan(self, call: Call) -> Any:
        plan = call()
        skip_backward(plan.pre_process)
        for layer in range(self._below):
            for node in layer_nodes(plan, layer):
                skip_backward(node)
        if plan.num_layers():
            begin_graph(plan, self._below)
        return plan
