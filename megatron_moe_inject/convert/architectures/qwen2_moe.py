"""Qwen2-MoE (Qwen1.5-MoE-A2.7B too): experts beside a shared one behind a gate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_moe_inject.convert.architectures.configuration import Keys
from megatron_moe_inject.convert.architectures.decoder import ONLY, READ
from megatron_moe_inject.convert.architectures.dense import WINDOW, check_full_attention
from megatron_moe_inject.convert.architectures.parts import Block, Heads, attention, gated
from megatron_moe_inject.convert.architectures.qwen3_moe import SPARSE, QwenExperts
from megatron_moe_inject.convert.architectures.table import Entry


class Qwen2Moe(QwenExperts):
    """Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B, with a shared expert whose output a sigmoid scales."""

    model_types = ("qwen2_moe",)
    keys = Keys(
        READ | SPARSE | WINDOW | {"layer_types", "shared_expert_intermediate_size", "qkv_bias"},
        {**ONLY, "use_sliding_window": (False,)},
    )

    def check(self, config: Any) -> None:
        super().check(config)
        check_full_attention(config)

    def attention_flags(self, config: Any) -> dict[str, Any]:
        flags = super().attention_flags(config)
        return flags | {"--add-qkv-bias": True} if config.qkv_bias else flags

    def attention(self, config: Any, block: Block) -> Iterator[Entry]:
        yield from attention(block, Heads.of(config), qkv_bias=config.qkv_bias)

    def router_flags(self, config: Any) -> dict[str, Any]:
        return super().router_flags(config) | {
            "--moe-shared-expert-intermediate-size": config.shared_expert_intermediate_size,
            "--moe-shared-expert-gate": True,
        }

    def expert_entries(self, config: Any, block: Block) -> Iterator[Entry]:
        yield from super().expert_entries(config, block)
        hidden, width = config.hidden_size, config.shared_expert_intermediate_size
        ours, theirs = "mlp.shared_experts.", "mlp.shared_expert."
        yield from gated(block, hidden, width, name=ours, within=theirs)
        yield block.entry(f"{ours}gate_weight", "mlp.shared_expert_gate.weight", (1, hidden))
