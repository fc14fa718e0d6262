"""Grouped GEMM in one piece with some experts of a layer frozen, for delayed FP8 scaling.

With delayed scaling a grouped linear layer carries a history of amaxes for each of its experts, and
Transformer Engine reduces the histories of all layers of a rank as one tensor. Two groups in its
place (``grouped.py``) would keep other histories than checkpoints hold, in another order on every
rank. So here the stock module runs whole, with the histories of stock Megatron, and is only led to
make weight gradients: it asks its first weight alone whether they are wanted. Those of frozen
experts are dropped by autograd as soon as they are made. That costs the products that make them
(a third of the frozen experts' training products) and room for one layer's gradients meanwhile.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_moe_inject.experts.freeze import grouped_linears

FIRST = "weight0"


def keeps_histories(config: Any) -> bool:
    """Whether FP8 modules carry histories of what they have seen, by delayed scaling."""
    return bool(config.fp8) and config.fp8_recipe == "delayed"


def train_whole(experts: torch.nn.Module) -> None:
    """Let a grouped MLP make the weight gradients of the experts that train, and of all others.

    Must run after ``requires_grad`` is set. Parameters, their names and their order stay as they
    are. Fused accumulation into ``main_grad`` is switched off for these layers, since frozen
    experts have none; DDP then adds what autograd hands on.
    """
    for linear in grouped_linears(experts):
        linear.fuse_wgrad_accumulation = False
        if not linear._parameters[FIRST].requires_grad:
            linear.register_forward_pre_hook(_show_first_weight)
            linear.register_forward_hook(_hide_first_weight, always_call=True)


def _show_first_weight(linear: torch.nn.Module, args: tuple) -> None:
    """Inside the forward pass ``weight0`` is the same values as a leaf that wants a gradient.

    An attribute of the instance comes before the registered parameter, which stays registered.
    """
    if torch.is_grad_enabled():
        linear.__dict__[FIRST] = linear._parameters[FIRST].detach().requires_grad_()


def _hide_first_weight(linear: torch.nn.Module, args: tuple, output: Any) -> None:
    linear.__dict__.pop(FIRST, None)
