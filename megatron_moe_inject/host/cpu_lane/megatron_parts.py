"""The Megatron parts without a CPU path, replaced where they are looked up.

A helper that leaves CPU tensors as tensors where numpy is expected; the local spec's norm, which
refuses sequence parallelism although its maths does not depend on it; and, on the development
branch, a type test that fails where Transformer Engine is absent.
"""

import copy
import functools
from typing import Any

import torch

from megatron_moe_inject.host.megatron_types import Config, MegatronModule


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


def _norm_under_sequence_parallelism() -> None:
    """The local spec's norm with ``--sequence-parallel``: weights marked for the TP all-reduce."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    original = WrappedTorchNorm.__new__

    @functools.wraps(original)
    def new(cls: type, config: Config, *args: Any, **kwargs: Any) -> MegatronModule:
        local = copy.copy(config)
        local.sequence_parallel = False
        norm = original(cls, local, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = new


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
    _norm_under_sequence_parallelism()
    _no_inference_linears()
