"""The Megatron parts without a CPU path, replaced where they are looked up.

A helper that leaves CPU tensors as tensors where numpy is expected; the local spec's norm, which
refuses sequence parallelism, on which its maths does not depend, and weights around zero; biases of
experts that are modules of their own, and sinks of attention; and, on the development branch, a
type test that fails where Transformer Engine is absent.
"""

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F

from megatron_moe_inject.host.lane_uses import (
    LANE_ATTENTION_SIZES,
    LANE_ROW_LINEAR,
    LANE_ROW_OUTPUT,
)
from megatron_moe_inject.host.megatron_types import Config, MegatronModule
from megatron_moe_inject.host.wrap import Call, wrap_function


def _counts_as_numpy() -> None:
    """The all-to-all dispatcher's split sizes: numpy also when they already are on the CPU."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    original = moe_utils.maybe_move_tensor_to_cpu

    @functools.wraps(original)
    def maybe_move_tensor_to_cpu(
        tensor: Any, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return tensor

    for module in (moe_utils, token_dispatcher):
        module.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


class _OneMoreNorm(torch.nn.RMSNorm):
    """RMS norm whose weight is one less than what it multiplies by."""

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


def _norms_of_all_kinds() -> None:
    """The local spec's norm with ``--sequence-parallel``: weights marked for the TP all-reduce. And
    with ``--apply-layernorm-1p``, of RMS norms."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    original = WrappedTorchNorm.__new__

    @functools.wraps(original)
    def new(cls: type, config: Config, *args: Any, **kwargs: Any) -> MegatronModule:
        local = copy.copy(config)
        local.sequence_parallel = False
        one_more = config.layernorm_zero_centered_gamma and config.normalization == "RMSNorm"
        if one_more:
            local.layernorm_zero_centered_gamma = False
        norm = original(cls, local, *args, **kwargs)
        if one_more:
            norm = _OneMoreNorm(norm.normalized_shape, eps=norm.eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = new


def _biases_of_experts() -> None:
    """Experts with biases (``SequentialMLP``) add the last one in place, to what a linear layer of
    one tensor-parallel rank returns as it is; autograd refuses that where a function was passed.
    And that bias is marked for the TP all-reduce of what works on parts of a sequence, though every
    rank has the gradient of its own tokens and shares it with the others as a replica's."""
    wrap_function(LANE_ROW_LINEAR, _unmarked)
    wrap_function(LANE_ROW_OUTPUT, _own_output)


def _unmarked(call: Call) -> None:
    call()
    linear = call["self"]
    if linear.is_expert and linear.bias is not None:
        linear.bias.sequence_parallel = False


def _own_output(call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    output, bias = call()
    expert = call["self"].is_expert
    return (output.clone() if expert and bias is not None else output), bias


def _sinks_are_sharded() -> None:
    """Attention sinks (``--softmax-type learnable``): marked as what each tensor-parallel rank has
    of its own heads, without which the gradient's norm leaves out all but the first rank's."""
    wrap_function(LANE_ATTENTION_SIZES, _with_sinks)


def _with_sinks(call: Call) -> None:
    from megatron.core import tensor_parallel

    call()
    sinks = call["self"].softmax_offset
    if isinstance(sinks, torch.nn.Parameter):
        tensor_parallel.set_tensor_model_parallel_attributes(sinks, True, 0, 1)


def _no_inference_linears() -> None:
    """MTP's test for inference linears (0.20 development), whose types need Transformer Engine."""
    from megatron.core.tensor_parallel import inference_layers
    from megatron.core.transformer import multi_token_prediction

    name = "is_inference_column_parallel_linear"
    if hasattr(multi_token_prediction, name) and not inference_layers.HAVE_TE:
        setattr(multi_token_prediction, name, lambda module: False)


def install() -> None:
    """Put all of the above in place."""
    _counts_as_numpy()
    _norms_of_all_kinds()
    _biases_of_experts()
    _sinks_are_sharded()
    _no_inference_linears()
