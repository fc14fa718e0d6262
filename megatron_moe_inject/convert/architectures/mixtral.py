"""Mixtral: experts in every layer, whose probabilities are a softmax over the chosen ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_moe_inject.convert.architectures.configuration import Keys, key_names
from megatron_moe_inject.convert.architectures.decoder import ONLY, READ, ExpertDecoder
from megatron_moe_inject.convert.architectures.dense import window_flags
from megatron_moe_inject.convert.architectures.parts import Block, gated_experts
from megatron_moe_inject.convert.architectures.routers import check_more_than_one
from megatron_moe_inject.convert.architectures.table import Entry


class Mixtral(ExpertDecoder):
    """Mixtral-8x7B and 8x22B."""

    model_types = ("mixtral",)
    experts_key = "num_local_experts"
    keys = Keys(
        READ | key_names("num_local_experts num_experts_per_tok sliding_window"),
        {**ONLY, "router_jitter_noise": (0.0,)},
    )

    def expert_width(self, config: Any) -> int:
        return config.intermediate_size

    def flags(self, config: Any) -> dict[str, Any]:
        return super().flags(config) | window_flags(config)

    def router_flags(self, config: Any) -> dict[str, Any]:
        check_more_than_one(config)
        return {}

    def expert_entries(self, config: Any, block: Block) -> Iterator[Entry]:
        yield from gated_experts(
            block,
            self.experts(config),
            config.hidden_size,
            config.intermediate_size,
            within="block_sparse_moe.",
            parts=("w1", "w3", "w2"),
        )
