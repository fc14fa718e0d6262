"""OLMoE: norms over all heads' queries and keys at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_moe_inject.convert.architectures.configuration import Keys, key_names
from megatron_moe_inject.convert.architectures.decoder import ONLY, READ, ExpertDecoder
from megatron_moe_inject.convert.architectures.parts import Block, Heads, attention
from megatron_moe_inject.convert.architectures.routers import softmax_router_flags
from megatron_moe_inject.convert.architectures.table import Entry

PROJECTION_NORMS = ("megatron_moe_inject.host.projection_norms", "layers")
"""Layers whose norms of queries and keys are over all heads; Megatron's own are of each head."""


class Olmoe(ExpertDecoder):
    """OLMoE-1B-7B."""

    model_types = ("olmoe",)
    experts_key = "num_experts"
    keys = Keys(
        READ | key_names("num_experts num_experts_per_tok norm_topk_prob"),
        {**ONLY, "attention_bias": (False,), "clip_qkv": (None,)},
    )

    def layouts(self, config: Any) -> tuple[str, ...]:
        return ("gpt",)  # a specification of its layers

    def expert_width(self, config: Any) -> int:
        return config.intermediate_size

    def attention_flags(self, config: Any) -> dict[str, Any]:
        return super().attention_flags(config) | {
            "--qk-layernorm": True,
            "--spec": PROJECTION_NORMS,
        }

    def router_flags(self, config: Any) -> dict[str, Any]:
        return softmax_router_flags(config)

    def attention(self, config: Any, block: Block) -> Iterator[Entry]:
        heads = Heads.of(config)
        keys = heads.groups * heads.width
        yield from attention(block, heads, norms=(heads.joined, keys))
