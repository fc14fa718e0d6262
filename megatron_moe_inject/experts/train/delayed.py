"""Frozen layers under ``--delay-wgrad-compute``.

Transformer Engine then keeps in a queue what a weight's gradient is made of, and Megatron asks each
linear layer of a node for its gradients when that node's backward has run. A frozen weight puts
nothing into the queue, which the layer takes for an error, so it is not asked. Grouped experts look
themselves; those that are frozen in part are refused (``refused_options.NO_PARTS``).
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_moe_inject.experts.train.uses import FROZEN_DELAYED
from megatron_moe_inject.host.megatron_types import Chunk, MegatronModule
from megatron_moe_inject.host.wrap import Call, wrap_method


def ask_no_frozen_layer(chunks: Sequence[Chunk]) -> None:
    """Take frozen layers of bare chunks out of what is asked, after ``requires_grad`` is set."""
    for chunk in chunks:
        if not getattr(chunk.config, "delay_wgrad_compute", False):
            continue
        for module in chunk.modules():
            if hasattr(module, "wgrad_store") and not _trains(module):
                wrap_method(module, FROZEN_DELAYED, _nothing)


def _trains(layer: MegatronModule) -> bool:
    """Whether any weight that it multiplies by trains; that of a norm in it has no queue."""
    return any(
        parameter.requires_grad
        for name, parameter in layer.named_parameters(recurse=False)
        if name.startswith("weight")
    )


def _nothing(call: Call) -> None:
    """No gradient."""
