"""The schedule plans of ``--overlap-moe-expert-parallel-comm``, as far as the plugin touches them.

Under that flag a micro-batch that trains does not go through the model's forward. The script asks
the chunk for a plan (``build_schedule_plan``), and Megatron runs its nodes, forward ones of one
micro-batch between backward ones of another, layer by layer: attention up to the router, dispatch,
experts, combine. A node detaches what it is given and runs a backward of its own. What follows:

- Hooks on a chunk, its block or a layer as a whole do not run. Those on routers and experts do, and
  so do wrapped methods.
- What goes from node to node is freed as soon as the next has read it.
- A node whose result belongs to no graph cannot run backward (``skip_backward``).

Passes without gradients (evaluation, the original model, profiles) go through the forward as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_moe_inject.host import compat
from megatron_moe_inject.host.megatron_types import Chunk


def runs_by_plan(chunk: Chunk) -> bool:
    """Whether micro-batches that train go through plans of this chunk."""
    config = getattr(chunk, "config", None)
    return bool(getattr(config, "overlap_moe_expert_parallel_comm", False))


def layer_nodes(plan: Any, layer: int) -> Iterator[Any]:
    """The nodes of a plan's ``layer``-th layer that do something."""
    for node in vars(plan.get_layer(layer)).values():
        if hasattr(node, "submodule"):
            yield node


def require_grad(node: Any, wanted: bool) -> None:
    """Whether the hidden states ``[s, b, h]`` that a layer's first node is given require grad."""
    run = node.submodule

    def submodule(node: Any, hidden: torch.Tensor) -> Any:
        return run(node, hidden.requires_grad_(wanted))  # the node's own, detached

    node.submodule = submodule


def first_node(plan: Any, layer: int) -> Any:
    """The node of a plan's ``layer``-th layer that gets its hidden states ``[s, b, h]``."""
    return compat.first_node(plan.get_layer(layer))


def skip_backward(node: Any) -> None:
    """Let a node run no backward; it gives no gradient, and forgets what it kept, as ever."""
    node.backward_func = lambda outputs, gradients: ()


def give_zeros(node: Any) -> None:
    """Let a node run no backward, and give zeros for what it was given first."""

    def backward(outputs: tuple, gradients: tuple) -> tuple:
        node.inputs[0].grad = torch.zeros_like(node.inputs[0])
        return ()

    node.backward_func = backward
