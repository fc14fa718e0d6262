"""Attention whose norms of queries and of keys go over all heads at once, as in OLMoE.

    --qk-layernorm --spec megatron_moe_inject.host.whole_norms layers

Megatron's ``--qk-layernorm`` norms each head by itself, with one weight of a head's width. Here the
mean of squares is over all heads, and each has weights of its own. With tensor parallelism a rank
holds the weights of its heads; the sum of squares is summed over the group, in fp32.

Shapes: s sequence, b batch, n heads of this rank, d a head's width.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class WholeNorm(torch.nn.Module):
    """RMS norm over the heads of all ranks of a group.

    Args:
        heads, width: n and d.
        eps: added to the mean of squares.
        dtype: of the weight.
        tp_group: ranks that have the other heads.
    """

    def __init__(
        self,
        heads: int,
        width: int,
        eps: float,
        dtype: torch.dtype,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.tp_group = tp_group
        self.total = heads * width * tp_group.size()
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(heads * width, dtype=dtype, device=device))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """``[s, b, n, d]`` normed, in the same type.

        One all-reduce of ``[s, b]`` fp32 numbers over ``tp_group`` each way, where it has more than
        one rank.
        """
        exact = states.float()
        squares = exact.square().sum(dim=(-2, -1), keepdim=True)
        # Every rank's heads are divided by the sum, so its gradient is summed over them as well.
        squares = reduce_from_tensor_model_parallel_region(squares, group=self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.tp_group)
        normed = exact * torch.rsqrt(squares / self.total + self.eps)
        return self.weight.view(states.shape[-2:]) * normed.to(states.dtype)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The weight, of which each rank of ``tp_group`` has its rows."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


class WholeNormAttention(SelfAttention):
    """Self-attention with these norms in the place of those of each head."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config, width = self.config, self.hidden_size_per_attention_head
        options = (width, config.layernorm_epsilon, config.params_dtype, self.pg_collection.tp)
        self.q_layernorm = WholeNorm(self.num_attention_heads_per_partition, *options)
        self.k_layernorm = WholeNorm(self.num_query_groups_per_partition, *options)


def layers(config: Any, vp_stage: int | None = None) -> Any:
    """The layers of Megatron's ``GPTModelConfig``, with the attention above.

    Raises:
        ValueError: options that it does not go with.
    """
    from megatron.training.models.gpt import default_layer_spec

    transformer = config.transformer
    tensor_parallel = transformer.tensor_model_parallel_size
    lacks = {
        "--qk-layernorm": transformer.qk_layernorm,
        "--normalization RMSNorm": transformer.normalization == "RMSNorm",
        "no --apply-layernorm-1p": not transformer.layernorm_zero_centered_gamma,
        "no --multi-latent-attention": not transformer.multi_latent_attention,
        f"--num-query-groups that --tensor-model-parallel-size {tensor_parallel} divides": (
            transformer.num_query_groups % tensor_parallel == 0
        ),
    }
    for option, there in lacks.items():
        if not there:
            raise ValueError(f"--spec {__name__} layers needs {option}")
    block = default_layer_spec(config, vp_stage)
    for layer in getattr(block, "layer_specs", [block]):
        layer.submodules.self_attention.module = WholeNormAttention
    return block
