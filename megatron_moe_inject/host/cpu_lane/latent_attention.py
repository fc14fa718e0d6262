"""Multi-latent attention (``--multi-latent-attention``) without Transformer Engine.

Megatron's local layers have two gaps here. Their core attention knows one head size, while queries
and keys are wider than values. And their projections down to the latents are column-parallel, which
loses the sum over tensor-parallel ranks of the gradient of the keys' rotary part: every rank uses
that part for its own heads. As with Transformer Engine, each rank has these projections whole and
runs them on its part of the sequence, where Megatron's own gather takes that sum.

Shapes: s sequence, p tensor-parallel size, b batch, h hidden.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_moe_inject.host.lane_uses import LANE_ATTENTION_SIZES, LANE_LAYERS
from megatron_moe_inject.host.megatron_types import Config
from megatron_moe_inject.host.wrap import Call, wrap_function


class WholeLinear(MegatronModule):
    """A linear layer that every tensor-parallel rank has whole, without bias.

    With Transformer Engine it is ``TELinear`` of ``parallel_mode="duplicated"``, by whose name
    Megatron's attention knows it; parameters carry the same marks and checkpoints the same keys.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Config,
        init_method: Any,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        parallel_mode: str,
        skip_weight_param_allocation: bool = False,
        tp_comm_buffer_name: str | None = None,
        tp_group: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        assert parallel_mode == "duplicated"
        assert (is_expert, bias, skip_bias_add) == (False, False, False)
        weight = torch.empty(output_size, input_size, dtype=config.params_dtype)
        self.weight = torch.nn.Parameter(weight)
        if config.perform_initialization:
            init_method(self.weight)
        marks = {"allreduce": True, "tensor_model_parallel": False}
        # Each rank sees its part of the sequence: Megatron sums the gradients over the ranks.
        for mark, value in (marks | {"sequence_parallel": config.sequence_parallel}).items():
            setattr(self.weight, mark, value)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """``[s/p, b, h]`` -> ``[s/p, b, output_size]`` (s without sequence parallelism), and no
        bias. No collective."""
        return F.linear(x, self.weight), None

    def get_extra_state(self) -> None:
        """Nothing, under the key where checkpoints hold what Transformer Engine keeps."""

    def set_extra_state(self, state: Any) -> None:
        """Ignored."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> Any:
        """The weight, the same on all tensor- and data-parallel ranks."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            None,
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )

    def backward_dw(self) -> None:
        """Nothing: the weight's gradient comes with the backward pass."""


def install() -> None:
    """Core attention takes the sizes of MLA, and its local layers have ``WholeLinear``."""
    from megatron.core.transformer import multi_latent_attention

    multi_latent_attention.TELinear = WholeLinear
    wrap_function(LANE_ATTENTION_SIZES, _with_sizes)
    wrap_function(LANE_LAYERS, _with_whole_projections)


def _with_sizes(call: Call) -> None:
    """``DotProductAttention(...)`` that takes ``k_channels`` and ``v_channels`` too."""
    call.kwargs.pop("k_channels", None)  # read from the queries
    v_channels = call.kwargs.pop("v_channels", None)
    call()
    if v_channels is not None:
        attention = call["self"]
        width = attention.num_attention_heads_per_partition * v_channels
        attention.hidden_size_per_partition = width


def _with_whole_projections(call: Call) -> Any:
    layer = call()
    if call["multi_latent_attention"]:
        whole = {"linear_q_down_proj": WholeLinear, "linear_kv_down_proj": WholeLinear}
        attention = layer.self_attention
        attention.submodules = dataclasses.replace(attention.submodules, **whole)
    return layer
