"""``--hybrid-layer-pattern``: what each layer of a hybrid model is, and which GPT block it is of.

A ``HybridModel`` has one layer for each symbol, numbered from 0: ``*`` attention, ``+`` and ``D``
multi-latent attention, ``E`` experts, ``-`` MLP, ``M`` Mamba, ``G`` gated delta net. ``|`` ends a
pipeline segment, ``/`` begins multi-token prediction. A ``GPTModel`` has blocks of an attention and
an MLP each, so that its block n is the n-th such pair of a pattern, as Megatron pairs them where it
loads a GPT checkpoint (``megatron.core.dist_checkpointing.gpt_checkpoint_interop``).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

ATTENTION = "*+D"
MLP = "E-"
EXPERTS = "E"
GPT_NAMES = "gpt:"
"""In front of a pattern of names: their layers are the blocks of a GPT model."""
_KINDS = {
    "*": "an attention layer",
    "+": "an attention layer",
    "D": "an attention layer",
    "E": "a layer of experts",
    "-": "a dense MLP layer",
    "M": "a Mamba layer",
    "G": "a layer of gated delta nets",
}


def name_matches(pattern: str, name: str, gpt_name: str | None) -> bool:
    """Whether a pattern of ``train.patterns`` names a parameter.

    Args:
        pattern: with shell wildcards; behind ``GPT_NAMES`` it is one of names in a GPT model.
        name: with global layer and expert numbers.
        gpt_name: the same in a GPT model; ``None`` where it has no such layer.
    """
    if not pattern.startswith(GPT_NAMES):
        return fnmatchcase(name, pattern)
    return gpt_name is not None and fnmatchcase(gpt_name, pattern.removeprefix(GPT_NAMES))


@dataclass(frozen=True)
class LayerPattern:
    """A pattern as written.

    Attributes:
        text: of the flag.
    """

    text: str

    @cached_property
    def segments(self) -> tuple[str, ...]:
        """The symbols of each pipeline segment of the decoder."""
        return tuple(self.text.partition("/")[0].split("|"))

    @property
    def symbols(self) -> str:
        """One for each layer of the decoder."""
        return "".join(self.segments)

    @property
    def prediction(self) -> tuple[str, ...]:
        """The symbols of each depth of multi-token prediction."""
        return tuple(self.text.split("/")[1:])

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        return len(self.symbols)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers of experts."""
        return self.where(EXPERTS)

    def where(self, kinds: str) -> tuple[int, ...]:
        """The layers whose symbols are among these."""
        return tuple(i for i, symbol in enumerate(self.symbols) if symbol in kinds)

    @cached_property
    def blocks(self) -> tuple[tuple[int, int], ...] | None:
        """GPT block n as its attention's and its MLP's layer; None where they do not take turns."""
        pairs = self.where(ATTENTION + MLP)
        kinds = [self.symbols[layer] in MLP for layer in pairs]
        if not pairs or len(pairs) % 2 or kinds != [False, True] * (len(pairs) // 2):
            return None
        return tuple(zip(pairs[::2], pairs[1::2], strict=True))

    def kind(self, layer: int) -> str:
        """What a layer is, in words."""
        return _KINDS.get(self.symbols[layer], f"a layer {self.symbols[layer]}")

    def block_of(self, layer: int) -> int | None:
        """The GPT block that a layer is part of, ``None`` if it is of none."""
        return next((n for n, pair in enumerate(self.blocks or ()) if layer in pair), None)

    def gpt_name(self, name: str) -> str | None:
        """What a GPT model calls ``decoder.layers.N.x``; ``None`` where it has no such layer."""
        first, second, number, rest = name.split(".", 3)
        block = self.block_of(int(number))
        return None if block is None else f"{first}.{second}.{block}.{rest}"

    def stages_without_experts(self, pipeline_size: int) -> list[int]:
        """Pipeline ranks none of whose segments has experts; segment i is rank ``i % size``'s.

        A pattern of one segment is cut into equal stages.
        """
        segments = self.segments
        if len(segments) == 1:
            length = max(1, self.num_layers // pipeline_size)
            segments = tuple(
                self.symbols[start : start + length]
                for start in range(0, length * pipeline_size, length)
            )
        held = ["".join(segments[rank::pipeline_size]) for rank in range(pipeline_size)]
        return [rank for rank, symbols in enumerate(held) if EXPERTS not in symbols]

    def table(self) -> str:
        """Which layers each GPT block is, in words."""
        if self.blocks is None:
            return f"attention and MLP do not take turns in {self.symbols}"
        pairs = ", ".join(f"block {n} = layers {a} and {m}" for n, (a, m) in enumerate(self.blocks))
        return f"in {self.symbols} {pairs}"


def pattern_of(args: Namespace | Mapping[str, Any]) -> LayerPattern | None:
    """The pattern of Megatron's options, of this run or saved ones; None for a GPT model."""
    options = args if isinstance(args, Mapping) else vars(args)
    for name in ("hybrid_layer_pattern", "hybrid_override_pattern"):
        if options.get(name):
            return LayerPattern(options[name])
    return None
