"""gpt-oss: biases everywhere, attention sinks, windows in every second layer, clamped experts.

The folder keeps the experts of a layer in one tensor, whose last axis has gate and up in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_moe_inject.convert.architectures.configuration import Keys, key_names, key_of
from megatron_moe_inject.convert.architectures.decoder import (
    ONLY,
    READ,
    ExpertDecoder,
    pattern_of,
)
from megatron_moe_inject.convert.architectures.forms import Form, GateUpInTurn, Same, Transposed
from megatron_moe_inject.convert.architectures.parts import Block, Heads, attention
from megatron_moe_inject.convert.architectures.rotary import yarn_flags
from megatron_moe_inject.convert.architectures.routers import check_more_than_one
from megatron_moe_inject.convert.architectures.table import Entry, Part
from megatron_moe_inject.host.errors import fail


class GptOss(ExpertDecoder):
    """gpt-oss-20b and gpt-oss-120b."""

    model_types = ("gpt_oss",)
    experts_key = "num_local_experts"
    keys = Keys(
        READ
        | key_names("num_local_experts num_experts_per_tok sliding_window layer_types swiglu_limit")
        | key_names("initial_context_length experts_per_token"),  # what transformers does not read
        {**ONLY, "attention_bias": (True,), "swiglu_alpha": (1.702,)},
    )

    def layouts(self, config: Any) -> tuple[str, ...]:
        return ("gpt",)  # windows are counted by layers, which a hybrid model has twice as many of

    def check(self, config: Any) -> None:
        super().check(config)
        for kind in sorted(set(config.layer_types)):
            if kind not in ("sliding_attention", "full_attention"):
                remedy = "served: sliding_attention, full_attention"
                raise fail(key_of("layer_types"), kind, "is not served", remedy)

    def expert_width(self, config: Any) -> int:
        return config.intermediate_size

    def flags(self, config: Any) -> dict[str, Any]:
        flags = super().flags(config)
        for name in ("--swiglu", "--disable-bias-linear"):
            del flags[name]
        return flags | {
            "--quick-geglu": True,
            "--glu-linear-offset": 1.0,
            "--activation-func-clamp-value": float(config.swiglu_limit),
            "--no-bias-gelu-fusion": True,  # the fused function clamps before it adds the bias
            "--no-bias-dropout-fusion": True,  # not with biases of grouped experts
            "--softmax-type": "learnable",
            **self._window_flags(config),
        }

    def _window_flags(self, config: Any) -> dict[str, Any]:
        """Which layers attend to a window, the token itself and ``sliding_window`` - 1 before."""
        kinds = [int(kind == "sliding_attention") for kind in config.layer_types]
        if not any(kinds):
            return {}
        in_turn = kinds == [int(layer % 2 == 0) for layer in range(len(kinds))]
        return {
            "--window-size": f"{config.sliding_window - 1},0",
            "--window-attn-skip-freq": 2 if in_turn else pattern_of(kinds),
        }

    def position_flags(self, config: Any) -> dict[str, Any]:
        return yarn_flags(config)

    def router_flags(self, config: Any) -> dict[str, Any]:
        check_more_than_one(config)
        return {}

    def attention(self, config: Any, block: Block) -> Iterator[Entry]:
        heads = Heads.of(config)
        yield from attention(block, heads, qkv_bias=True, out_bias=True)
        sinks = "self_attention.core_attention.softmax_offset"
        yield block.entry(sinks, "self_attn.sinks", (config.num_attention_heads,))

    def expert_entries(self, config: Any, block: Block) -> Iterator[Entry]:
        h, f, count = config.hidden_size, config.intermediate_size, config.num_local_experts
        yield block.entry("mlp.router.weight", "mlp.router.weight", (count, h))
        yield block.entry("mlp.router.bias", "mlp.router.bias", (count,))
        tensors: dict[str, tuple[str, tuple[int, ...], Form]] = {
            "linear_fc1.weight": ("gate_up_proj", (2 * f, h), GateUpInTurn()),
            "linear_fc1.bias": ("gate_up_proj_bias", (2 * f,), GateUpInTurn()),
            "linear_fc2.weight": ("down_proj", (h, f), Transposed()),
            "linear_fc2.bias": ("down_proj_bias", (h,), Same()),
        }
        for expert in range(count):
            for name, (part, shape, form) in tensors.items():
                parts = [Part(f"mlp.experts.{part}", (expert,))]
                name = f"mlp.experts.experts.{name}"
                yield block.entry(name, parts, shape, form, expert=expert)
