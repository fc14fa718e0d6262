"""What decoders with rotary attention have in common: their flags, embedding, head and layers.

A subclass is the table of an architecture. It lists its configuration's keys and says what stands
in a layer.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from megatron_moe_inject.convert.architectures.configuration import SILU, Keys, key_names
from megatron_moe_inject.convert.architectures.parts import (
    Block,
    Heads,
    attention,
    gated,
    gated_experts,
    head_width,
    mlp_norm,
    outside,
)
from megatron_moe_inject.convert.architectures.rotary import rope_flags
from megatron_moe_inject.convert.architectures.table import Architecture, Entry

READ = key_names(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings "
    "rope_parameters attention_dropout"
)
"""Keys of every decoder of this kind."""

ONLY: Mapping[str, Any] = {"hidden_act": SILU, "is_encoder_decoder": (False,)}


class Decoder(Architecture):
    """A decoder of attention and gated feed-forwards under RMS norms.

    Attributes:
        keys: of its configuration.
        attention_symbol: of a hybrid pattern, ``*`` or ``+``.
    """

    keys: Keys
    attention_symbol = "*"

    def layouts(self, config: Any) -> tuple[str, ...]:
        scaled = config.rope_parameters.get("rope_type") == "llama3"
        return ("gpt",) if scaled else ("gpt", "hybrid")

    def for_folder(self, config: Any, names: Container[str]) -> Any:
        return config

    def check(self, config: Any) -> None:
        self.keys.check(config)
        self.flags(config)

    def flags(self, config: Any) -> dict[str, Any]:
        flags: dict[str, Any] = {
            "--num-layers": config.num_hidden_layers,
            "--hidden-size": config.hidden_size,
            "--ffn-hidden-size": config.intermediate_size,
            **self.attention_flags(config),
            "--normalization": "RMSNorm",
            "--norm-epsilon": config.rms_norm_eps,
            "--swiglu": True,
            "--disable-bias-linear": True,
            **self.position_flags(config),
            "--max-position-embeddings": config.max_position_embeddings,
            "--attention-dropout": float(config.attention_dropout or 0.0),
            "--hidden-dropout": 0.0,
        }
        if not config.tie_word_embeddings:
            flags["--untie-embeddings-and-output-weights"] = True
        return flags

    def attention_flags(self, config: Any) -> dict[str, Any]:
        """Options of the attention's sizes."""
        return {
            "--num-attention-heads": config.num_attention_heads,
            "--group-query-attention": True,
            "--num-query-groups": config.num_key_value_heads,
            "--kv-channels": head_width(config),
        }

    def position_flags(self, config: Any) -> dict[str, Any]:
        """Options of the rotary embedding; RecipeError for one that Megatron has not."""
        return rope_flags(config)

    def entries(self, config: Any) -> Iterator[Entry]:
        vocabulary = (config.vocab_size, config.hidden_size)
        embedding, head = "model.embed_tokens.weight", "lm_head.weight"
        yield outside("embedding.word_embeddings.weight", embedding, vocabulary, padded=True)
        for layer in range(config.num_hidden_layers):
            yield from self.layer(config, layer, Block(f"model.layers.{layer}.", layer))
        size = (config.hidden_size,)
        yield outside("decoder.final_layernorm.weight", "model.norm.weight", size)
        if not config.tie_word_embeddings:
            yield outside("output_layer.weight", head, vocabulary, padded=True)

    def layer(self, config: Any, layer: int, block: Block) -> Iterator[Entry]:
        """Entries of one layer of the decoder."""
        yield from self.attention(config, block)
        yield mlp_norm(block, config.hidden_size)
        yield from self.feed_forward(config, layer, block)

    def attention(self, config: Any, block: Block) -> Iterator[Entry]:
        """Entries of a layer's attention and of the norm in front of it."""
        yield from attention(block, Heads.of(config))

    @abstractmethod
    def feed_forward(self, config: Any, layer: int, block: Block) -> Iterator[Entry]:
        """Entries of a layer's feed-forward or experts, without the norm in front of it."""
        ...

    def copies(self, config: Any) -> dict[str, str]:
        if config.tie_word_embeddings:
            return {"lm_head.weight": "model.embed_tokens.weight"}
        return {}

    def stacked_layers(self, config: Any) -> bool:
        return True

    def expert_layer(self, config: Any, layer: int) -> bool:
        """Whether a layer has experts."""
        return False

    def layer_pattern(self, config: Any) -> str:
        mlp = (
            "E" if self.expert_layer(config, layer) else "-"
            for layer in range(config.num_hidden_layers)
        )
        return "".join(self.attention_symbol + symbol for symbol in mlp)


class DenseDecoder(Decoder):
    """One whose feed-forwards are dense."""

    def feed_forward(self, config: Any, layer: int, block: Block) -> Iterator[Entry]:
        yield from gated(block, config.hidden_size, config.intermediate_size)


class ExpertDecoder(Decoder):
    """One with experts in some or all layers, each expert in tensors of its own."""

    experts_key: str

    def experts(self, config: Any) -> int:
        """How many experts a layer has."""
        return getattr(config, self.experts_key)

    def expert_width(self, config: Any) -> int:
        """Width of an expert."""
        return config.moe_intermediate_size

    def expert_layer(self, config: Any, layer: int) -> bool:
        return True

    def feed_forward(self, config: Any, layer: int, block: Block) -> Iterator[Entry]:
        if self.expert_layer(config, layer):
            yield from self.expert_entries(config, block)
        else:
            yield from gated(block, config.hidden_size, config.intermediate_size)

    def expert_entries(self, config: Any, block: Block) -> Iterator[Entry]:
        """Entries of a layer's router and experts."""
        count, width = self.experts(config), self.expert_width(config)
        yield from gated_experts(block, count, config.hidden_size, width)

    def flags(self, config: Any) -> dict[str, Any]:
        flags = super().flags(config) | {
            "--num-experts": self.experts(config),
            "--moe-ffn-hidden-size": self.expert_width(config),
            "--moe-router-topk": config.num_experts_per_tok,
            **self.router_flags(config),
        }
        kinds = self.layer_kinds(config)
        if 0 in kinds:
            flags["--moe-layer-freq"] = pattern_of(kinds)
        return flags

    @abstractmethod
    def router_flags(self, config: Any) -> dict[str, Any]:
        """Options of how the router makes probabilities of logits."""
        ...

    def layer_kinds(self, config: Any) -> list[int]:
        """1 for a layer with experts, 0 for a dense one."""
        return [int(self.expert_layer(config, i)) for i in range(config.num_hidden_layers)]

    def stacked_layers(self, config: Any) -> bool:
        return 0 not in self.layer_kinds(config)


def pattern_of(kinds: Sequence[int]) -> str:
    """A list as Megatron's options of layers take it: ``[0]*3+[1]*58``."""
    runs = ((kind, len(list(run))) for kind, run in itertools.groupby(kinds))
    return "+".join(f"[{kind}]*{length}" for kind, length in runs)
