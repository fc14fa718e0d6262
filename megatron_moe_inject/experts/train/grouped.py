"""Grouped GEMM with some experts of a layer frozen.

Transformer Engine's ``GroupedLinear`` asks its first weight alone whether weight gradients are
wanted, so mixed ``requires_grad`` flags train nothing, or everything. Here it never makes any: to
it all experts of such a layer are frozen, so one grouped GEMM goes forward and one back to the
rows, with the quantised weights and, under delayed FP8 scaling, the histories of stock Megatron.
The weight gradients of the experts that train are products of their own behind it, from their rows
of the input, of which copies are kept: in bf16 also where the layer multiplies in FP8, whose weight
gradients would be of quantised rows. Nothing is kept or made for frozen experts.

It asks the first weight alone about FP8, too. Where the frozen experts are FP8 tensors
(``frozen_fp8.py``) it gets the others in FP8 as well, encoded in the first micro-batch of a step,
as it encodes weights itself.

The stock module goes on owning every parameter: names, order, DDP buffers and checkpoints are those
of stock Megatron.

Shapes: m rows (tokens times top-k on this rank), n inputs, k outputs of a linear layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_moe_inject.experts.fp8 import weights as fp8_weights
from megatron_moe_inject.experts.train.uses import GROUPED_FORWARD
from megatron_moe_inject.host.accumulate import multiply_into, placeholder
from megatron_moe_inject.host.megatron_types import Chunk, MegatronModule
from megatron_moe_inject.host.model_parts import (
    decoder_layers,
    grouped_linears,
    local_weights,
    mlp_of,
)
from megatron_moe_inject.host.wrap import Call, wrap_method


def train_grouped_experts(chunks: Sequence[Chunk]) -> int:
    """Let every layer with frozen and trainable local experts in one grouped MLP train the latter.

    Must run after ``requires_grad`` is set and frozen experts are encoded, and before DDP. No
    collective.

    Returns:
        How many such layers this rank has.
    """
    count = 0
    for chunk in chunks:
        for layer in decoder_layers(chunk):
            experts = getattr(mlp_of(layer), "experts", None)
            count += experts is not None and train_some(experts)
    return count


def train_some(experts: MegatronModule) -> bool:
    """Let a grouped MLP make the gradients of those of its experts that train.

    Weight gradients are added to ``main_grad`` in the product where the layer's
    ``fuse_wgrad_accumulation`` says so.

    Returns:
        False for other experts, and where all train or none does: then nothing changes.
    """
    recomputed = getattr(experts, "activation_recompute", False)
    changed = False
    for linear in grouped_linears(experts):
        trains = [linear._parameters[name].requires_grad for _, _, name in _parameters(linear)]
        if any(trains) and not all(trains):
            _GradientsOfSome(linear, recomputed and linear is experts.linear_fc2)
            changed = True
    return changed


class _GradientsOfSome:
    """The forward pass of one grouped linear layer.

    It takes the place of ``forward``, so that it runs after all pre-hooks: under
    ``--overlap-param-gather`` a pre-hook of DDP's waits for the weights.

    Args:
        linear: ``[m, n]`` rows and the number of each expert's to ``[m, k]``.
        recomputed: Megatron drops the input after the forward pass and makes it again, in the same
            storage, before the backward pass of the layer. Then no copy is kept.
    """

    def __init__(self, linear: MegatronModule, recomputed: bool) -> None:
        self._linear = linear
        self._recomputed = recomputed
        self._names = [
            place for place in _parameters(linear) if linear._parameters[place[2]].requires_grad
        ]
        weights = local_weights(linear)
        self._in_fp8 = next((w for w in weights if fp8_weights.is_fp8(w)), None)
        self._encoded: dict[str, Tensor] = {}
        wrap_method(linear, GROUPED_FORWARD, self._forward)

    def _forward(self, call: Call) -> tuple[Tensor, Any]:
        rows, counts = call["x"], call["m_splits"]
        try:
            # An attribute of the instance comes before the registered parameter, which stays.
            self._linear.__dict__.update(self._frozen())
            result, bias = call()
        finally:
            for _, _, name in self._names:
                self._linear.__dict__.pop(name, None)
        if not torch.is_grad_enabled():
            return result, bias
        ends = list(itertools.accumulate(counts))
        wanted = [
            _Wanted(slice(ends[expert] - counts[expert], ends[expert]), kind)
            for expert, kind, _ in self._names
        ]
        result = _AddGradients.apply(
            result, rows.detach(), wanted, self._recomputed,
            getattr(self._linear, "fuse_wgrad_accumulation", False),
            *(self._linear._parameters[name] for _, _, name in self._names),
        )  # fmt: skip
        return result, bias

    def _frozen(self) -> dict[str, Tensor]:
        """What trains as constants, by name: in FP8 where the other weights are."""
        linear = self._linear
        changed = getattr(linear, "is_first_microbatch", True)
        if changed or getattr(linear, "disable_parameter_transpose_cache", False):
            self._encoded.clear()
        constants = {}
        for _, kind, name in self._names:
            parameter = linear._parameters[name]
            encodes = kind == "weight" and self._in_fp8 is not None
            if encodes and not fp8_weights.is_fp8(parameter):
                if name not in self._encoded:
                    self._encoded[name] = fp8_weights.encoded_like(self._in_fp8, parameter)
                constants[name] = self._encoded[name]
            else:
                constants[name] = parameter.detach()
        return constants


def _parameters(linear: MegatronModule) -> list[tuple[int, str, str]]:
    """Expert, kind and name of what a layer multiplies by or adds itself.

    Biases that it returns are not among them: autograd sees these.
    """
    kinds = ("weight", "bias") if getattr(linear, "apply_bias", False) else ("weight",)
    return [
        (expert, kind, f"{kind}{expert}") for expert in range(linear.num_gemms) for kind in kinds
    ]


@dataclass(frozen=True)
class _Wanted:
    """The rows of one expert, and of what a gradient is wanted."""

    rows: slice
    kind: str


class _AddGradients(torch.autograd.Function):
    """Identity on a layer's output ``[m, k]``, whose backward pass makes parameters' gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        rows: Tensor,
        wanted: Sequence[_Wanted],
        recomputed: bool,
        accumulate_main_grad: bool,
        *parameters: torch.nn.Parameter,
    ) -> Tensor:
        ctx.wanted, ctx.parameters, ctx.fused = wanted, parameters, accumulate_main_grad
        inputs = [rows[one.rows] for one in wanted if one.kind == "weight"]
        if not recomputed:
            inputs = [part.to(output.dtype, copy=True) for part in inputs]
        ctx.save_for_backward(*inputs)
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = iter(ctx.saved_tensors)
        gradients: list[Tensor | None] = []
        for one, parameter in zip(ctx.wanted, ctx.parameters, strict=True):
            part = grad[one.rows]
            if one.kind == "bias":
                gradients.append(part.sum(0))
                continue
            rows = next(inputs).to(grad.dtype)
            if ctx.fused:
                multiply_into(parameter.main_grad, part.t(), rows)
                gradients.append(placeholder(parameter))
            else:
                gradients.append(part.t() @ rows)
        return grad, *[None] * 4, *gradients
