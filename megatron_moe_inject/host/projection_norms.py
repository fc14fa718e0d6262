"""Attention whose queries and keys are normalised over all heads together, as in OLMoE.

    --qk-layernorm --normalization RMSNorm --spec megatron_moe_inject.host.projection_norms layers

Megatron's norms of queries and keys (``--qk-layernorm``) are of each head by itself, with one
weight for all; OLMoE's are of the whole projection. Here the sum of squares runs over the heads of
all tensor-parallel ranks. Each rank has the weights of all heads and uses those of its own:
Megatron sums the gradients of what is called ``q_layernorm`` and ``k_layernorm`` over these ranks.

Shapes: s sequence, b batch, n heads (or key groups) of all p tensor-parallel ranks, d head size.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.module import MegatronModule

from megatron_moe_inject.host.megatron_types import Config


class ProjectionNorm(MegatronModule):
    """RMS norm over all heads.

    Args:
        heads: how many heads there are on all ranks.
        hidden_size: of a head.
    """

    def __init__(self, *, config: Config, heads: int, hidden_size: int, eps: float) -> None:
        super().__init__(config)
        self.eps = eps
        self.heads = heads
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        weight = torch.ones(heads * hidden_size, dtype=config.params_dtype)
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[s, b, n/p, d]``, in fp32 until the weight is applied.

        One all-reduce of ``[s, b]`` over the tensor-parallel group, forward and backward.
        """
        wide = x.float()
        squares = wide.square().sum((2, 3), keepdim=True)
        if self.tp_group.size() > 1:
            squares = tensor_parallel.reduce_from_tensor_model_parallel_region(
                squares, group=self.tp_group
            )
            squares = tensor_parallel.copy_to_tensor_model_parallel_region(
                squares, group=self.tp_group
            )
        mean = squares / (self.heads * x.size(3))
        normed = wide * torch.rsqrt(mean + self.eps)
        first = self.tp_group.rank() * x.size(2)
        own = self.weight.view(self.heads, x.size(3))[first : first + x.size(2)]
        return own * normed.to(x.dtype)


def layers(config: Any, vp_stage: int | None = None) -> Any:
    """The layers of Megatron's ``GPTModelConfig``, with the norms above.

    Raises:
        ValueError: no norm is asked for, or another kind; or a rank would have part of a key group.
    """
    from megatron.training.models.gpt import default_layer_spec

    model = config.transformer
    if not model.qk_layernorm or model.normalization != "RMSNorm":
        raise ValueError(f"--spec {__name__}: add --qk-layernorm and --normalization RMSNorm")
    if model.num_query_groups % model.tensor_model_parallel_size:
        raise ValueError(
            f"--spec {__name__}: --tensor-model-parallel-size {model.tensor_model_parallel_size} "
            f"does not divide the {model.num_query_groups} key groups; use a divisor of them"
        )
    block = default_layer_spec(config, vp_stage)
    for layer in getattr(block, "layer_specs", [block]):
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = functools.partial(ProjectionNorm, heads=model.num_attention_heads)
        attention.k_layernorm = functools.partial(ProjectionNorm, heads=model.num_query_groups)
    return block
