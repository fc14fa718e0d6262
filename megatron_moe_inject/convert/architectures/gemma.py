"""Gemma: gated GELU, norms that add one to their weights, an embedding times the root of h.

Gemma 1 becomes a GPT model by a specification of its layers. Megatron scales no embedding, so its
model holds the product, and the head apart, which the folder keeps as one tensor with the
embedding. Gemma 2 and 3 have parts that Megatron has not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

from megatron_moe_inject.convert.architectures.configuration import Keys, key_of
from megatron_moe_inject.convert.architectures.decoder import READ, DenseDecoder
from megatron_moe_inject.convert.architectures.forms import Scaled
from megatron_moe_inject.convert.architectures.parts import outside
from megatron_moe_inject.convert.architectures.table import Entry
from megatron_moe_inject.host.errors import fail

GELU_GATES = ("megatron_moe_inject.host.gelu_gates", "layers")
"""Layers whose gates are a GELU; Megatron's option for gates means another function."""
_GELU = "gelu_pytorch_tanh"
_LACKING = {
    "gemma2": "norms behind attention and feed-forward, soft caps of scores and logits",
    "gemma3": "norms behind attention and feed-forward, two rotary embeddings",
    "gemma3_text": "norms behind attention and feed-forward, two rotary embeddings",
}


class Gemma(DenseDecoder):
    """Gemma 1 (2B, 7B)."""

    model_types = ("gemma",)
    keys = Keys(
        READ - {"tie_word_embeddings"},
        {
            "attention_bias": (False,),
            "hidden_act": (_GELU,),
            "hidden_activation": (None, _GELU),
            "is_encoder_decoder": (False,),
            "tie_word_embeddings": (True,),
            "use_bidirectional_attention": (None, False),
        },
    )

    def layouts(self, config: Any) -> tuple[str, ...]:
        return ("gpt",)  # a specification of its layers

    def flags(self, config: Any) -> dict[str, Any]:
        return super().flags(config) | {
            "--apply-layernorm-1p": True,
            "--spec": GELU_GATES,
            "--untie-embeddings-and-output-weights": True,
        }

    def entries(self, config: Any) -> Iterator[Entry]:
        embedding, *others = super().entries(config)
        yield replace(embedding, form=Scaled(config.hidden_size**0.5), follows=True)
        yield from others
        (part,) = embedding.parts
        yield outside("output_layer.weight", part.name, embedding.shape, padded=True)


class LaterGemma(DenseDecoder):
    """Gemma 2 and 3, which Megatron-Core cannot express: an error that says so."""

    model_types = tuple(_LACKING)

    def layouts(self, config: Any) -> tuple[str, ...]:
        return ()

    def check(self, config: Any) -> None:
        self._refuse(config)

    def flags(self, config: Any) -> dict[str, Any]:
        self._refuse(config)

    def _refuse(self, config: Any) -> NoReturn:
        lacking = _LACKING[config.model_type]
        raise fail(
            key_of("model_type"), config.model_type, f"Megatron-Core has none of its {lacking}",
            "as a teacher it needs no conversion (source: hf:<folder>)",
        )  # fmt: skip
