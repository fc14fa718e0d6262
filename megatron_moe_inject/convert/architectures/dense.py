"""Dense decoders: Llama, Mistral, Qwen2 and Qwen3, which teach, and which learn from experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_moe_inject.convert.architectures.configuration import Keys, key_names, key_of
from megatron_moe_inject.convert.architectures.decoder import ONLY, READ, DenseDecoder
from megatron_moe_inject.convert.architectures.parts import Block, Heads, attention, head_width
from megatron_moe_inject.convert.architectures.table import Entry
from megatron_moe_inject.host.errors import fail

WINDOW = key_names("sliding_window max_window_layers")
"""Keys of a window that ``use_sliding_window`` switches off."""


class Llama(DenseDecoder):
    """Llama 1 to 3.1 and 3.3, and what calls itself so; without biases."""

    model_types = ("llama",)
    keys = Keys(READ, {**ONLY, "attention_bias": (False,), "mlp_bias": (False,)})


class Mistral(DenseDecoder):
    """Mistral 7B and others, with or without a sliding window."""

    model_types = ("mistral",)
    keys = Keys(READ | {"sliding_window"}, ONLY)

    def flags(self, config: Any) -> dict[str, Any]:
        return super().flags(config) | window_flags(config)


class Qwen2(DenseDecoder):
    """Qwen2 and Qwen2.5, with biases of queries, keys and values."""

    model_types = ("qwen2",)
    keys = Keys(
        READ | WINDOW | {"layer_types"},
        {**ONLY, "use_sliding_window": (False,)},
    )

    def check(self, config: Any) -> None:
        super().check(config)
        check_full_attention(config)

    def attention_flags(self, config: Any) -> dict[str, Any]:
        return super().attention_flags(config) | {"--add-qkv-bias": True}

    def attention(self, config: Any, block: Block) -> Iterator[Entry]:
        yield from attention(block, Heads.of(config), qkv_bias=True)


class Qwen3(DenseDecoder):
    """Qwen3 from 0.6B to 32B, with norms of the queries and keys of each head."""

    model_types = ("qwen3",)
    keys = Keys(
        READ | WINDOW | {"layer_types"},
        {**ONLY, "attention_bias": (False,), "use_sliding_window": (False,)},
    )

    def check(self, config: Any) -> None:
        super().check(config)
        check_full_attention(config)

    def attention_flags(self, config: Any) -> dict[str, Any]:
        return super().attention_flags(config) | {"--qk-layernorm": True}

    def attention(self, config: Any, block: Block) -> Iterator[Entry]:
        width = head_width(config)
        yield from attention(block, Heads.of(config), norms=(width, width))


def check_full_attention(config: Any) -> None:
    """RecipeError where a layer attends to a window."""
    kinds = sorted(set(config.layer_types) - {"full_attention"})
    if kinds:
        remedy = "served: full_attention in every layer"
        raise fail(key_of("layer_types"), kinds[0], "is not served", remedy)


def window_flags(config: Any) -> dict[str, Any]:
    """Options of a window in every layer: a token sees itself and ``sliding_window`` - 1 before."""
    if config.sliding_window is None:
        return {}
    return {"--window-size": f"{config.sliding_window - 1},0"}
