"""Qwen3-MoE: experts in most layers, norms of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_moe_inject.convert.architectures.configuration import Keys, key_names
from megatron_moe_inject.convert.architectures.decoder import ONLY, READ, ExpertDecoder
from megatron_moe_inject.convert.architectures.dense import WINDOW
from megatron_moe_inject.convert.architectures.parts import Block, Heads, attention, head_width
from megatron_moe_inject.convert.architectures.routers import softmax_router_flags
from megatron_moe_inject.convert.architectures.table import Entry

SPARSE = key_names(
    "num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step "
    "mlp_only_layers"
)
"""Keys of Qwen's experts."""


class QwenExperts(ExpertDecoder):
    """Which layers have experts, and how they are routed, in Qwen2-MoE and Qwen3-MoE."""

    experts_key = "num_experts"

    def expert_layer(self, config: Any, layer: int) -> bool:
        every = (layer + 1) % config.decoder_sparse_step == 0
        return every and layer not in config.mlp_only_layers

    def router_flags(self, config: Any) -> dict[str, Any]:
        return softmax_router_flags(config)


class Qwen3Moe(QwenExperts):
    """Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder."""

    model_types = ("qwen3_moe",)
    keys = Keys(
        READ | SPARSE | WINDOW,
        {
            **ONLY,
            "attention_bias": (False,),
            "use_sliding_window": (False,),
            "use_qk_norm": (True,),  # of newer folders; transformers does not read it
        },
    )

    def attention_flags(self, config: Any) -> dict[str, Any]:
        return super().attention_flags(config) | {"--qk-layernorm": True}

    def attention(self, config: Any, block: Block) -> Iterator[Entry]:
        width = head_width(config)
        yield from attention(block, Heads.of(config), norms=(width, width))
