"""Where a checkpoint stores a slice of the model: key, place on the leading axes, other names.

Megatron stores the layers of a GPT model in one of two ways, ``decoder.layers.x`` of all of them as
one tensor or ``decoder.layers.3.x`` of each alone (``TransformerBlock.sharded_state_dict``: where
layers differ), and a hybrid model as layers of one family each (``host.gpt_names``). Experts are an
axis of their own. Norms have two names (``host.norm_names``), and every module that Transformer
Engine has a class for asks for an ``_extra_state``, as Megatron's own linear layers do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_moe_inject.convert.architectures.table import Entry, Slot
from megatron_moe_inject.host.gpt_names import Place, to_hybrid
from megatron_moe_inject.host.layer_pattern import LayerPattern
from megatron_moe_inject.host.norm_names import other_name

PATTERN = "--hybrid-layer-pattern"
_LAYERS = "decoder.layers."
_ONE_LAYER = re.compile(r"decoder\.layers\.\d")
_LAYER = re.compile(r"^decoder\.layers\.(?:(\d+)\.)?(.*)$")
_MTP_BLOCK = re.compile(r"^(mtp\.layers\.\d+)\.transformer_layer\.(.*)$")
_ATTENTION = ("self_attention.", "input_layernorm.")
_LATENT_NORMS = ("self_attention.q_layernorm.", "self_attention.kv_layernorm.")
_OF_MODULES = ("weight", "softmax_offset")
"""Parameters by which a module that may have an ``_extra_state`` is known."""
_NO_EXTRA_STATE = ("word_embeddings", "position_embeddings", "router", "conv1d")
_OF_GPT = ("--num-layers", "--moe-layer-freq", "--mtp-num-layers")
"""Options that the pattern of a hybrid model says instead."""


@dataclass(frozen=True)
class Stored:
    """Where a slice is stored.

    Attributes:
        names: of the stored tensor, its own first, then another that a kind of layers asks for.
        axes: sizes of the leading axes, which number layers and experts.
        place: the slice's indices on them.
    """

    names: tuple[str, ...]
    axes: tuple[int, ...]
    place: tuple[int, ...]

    def extra_states(self) -> Iterator[str]:
        """The ``_extra_state`` of its module, under each of its names, with its place."""
        place, axes = (".".join(map(str, n)) for n in (self.place or (0,), self.axes or (1,)))
        for name in self.names:
            module, _, last = name.rpartition(".")
            if last in _OF_MODULES and module.rpartition(".")[2] not in _NO_EXTRA_STATE:
                yield f"{module}._extra_state/shard_{place}_{axes}"


@dataclass(frozen=True)
class Naming:
    """How one checkpoint names the slices of a model.

    Attributes:
        layers: of the decoder; blocks of a GPT model.
        experts: of a layer.
        stacked: all layers in one tensor.
        latent: the attention is multi-latent, which has norms of its own.
        pattern: of a hybrid model.
        numbers_layers: slots have the numbers of the pattern's layers rather than a GPT model's.
    """

    layers: int
    experts: int = 0
    stacked: bool = True
    latent: bool = False
    pattern: LayerPattern | None = None
    numbers_layers: bool = False

    def stored(self, slot: Slot) -> Stored:
        """Where a slice is stored."""
        name, axes, place = self._of_layer(slot)
        if slot.expert is not None:
            axes, place = (*axes, self.experts), (*place, slot.expert)
        other = other_name(name)
        if other is None or (not self.latent and any(norm in name for norm in _LATENT_NORMS)):
            return Stored((name,), axes, place)
        return Stored((name, other), axes, place)

    def seen_in(self, pattern: LayerPattern | None, by_layer: bool) -> Naming | None:
        """How a checkpoint of the same model names it; ``None`` for one of other layers.

        Args:
            pattern: of the checkpoint, if it is a hybrid model.
            by_layer: whether its names are of one layer each.
        """
        if self.numbers_layers:
            return self
        if pattern is None:
            return replace(self, stacked=not by_layer, pattern=None)
        if pattern.blocks is None or len(pattern.blocks) != self.layers:
            return None
        return replace(self, stacked=False, pattern=pattern)

    def _of_layer(self, slot: Slot) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """Key, axes and place, experts aside."""
        if slot.layer is None:
            return self._of_none(slot.name), (), ()
        if self.pattern is not None and not self.numbers_layers:
            return to_hybrid(_LAYERS + slot.name, (slot.layer,), self.pattern)[0], (), ()
        if self.stacked and self.pattern is None:
            return _LAYERS + slot.name, (self.layers,), (slot.layer,)
        return f"{_LAYERS}{slot.layer}.{slot.name}", (), ()

    def _of_none(self, name: str) -> str:
        if self.pattern is None:
            return name
        block = _MTP_BLOCK.match(name)
        if block is not None:
            layer = int(not block[2].startswith(_ATTENTION))
            return f"{block[1]}.mtp_model_layer.layers.{layer}.{block[2]}"
        return to_hybrid(name, (), self.pattern)[0]


def extra_states(naming: Naming, stored: Iterable[Stored]) -> Iterator[str]:
    """Every ``_extra_state`` that a model of these slices asks for."""
    yield from dict.fromkeys(name for where in stored for name in where.extra_states())
    if naming.pattern is not None:
        yield "output_layer._extra_state/shard_0_1"


def naming_of(flags: Mapping[str, Any], stacked: bool) -> Naming:
    """How Megatron stores a model of these options, one of tables' (``Architecture.flags``)."""
    pattern = flags.get(PATTERN)
    return Naming(
        layers=LayerPattern(pattern).num_layers if pattern else flags["--num-layers"],
        experts=flags.get("--num-experts") or 0,
        stacked=stacked,
        latent=bool(flags.get("--multi-latent-attention")),
        pattern=LayerPattern(pattern) if pattern else None,
        numbers_layers=pattern is not None,
    )


def as_hybrid(
    flags: Mapping[str, Any], naming: Naming, layer_pattern: str
) -> tuple[dict[str, Any], Naming]:
    """Options and naming of the hybrid model that has a GPT model's layers.

    Args:
        flags: of the GPT model.
        naming: of it.
        layer_pattern: of the hybrid model (``Architecture.layer_pattern``).
    """
    if naming.pattern is not None:
        return dict(flags), naming
    others = {name: value for name, value in flags.items() if name not in _OF_GPT}
    pattern = LayerPattern(layer_pattern)
    return {PATTERN: layer_pattern, **others}, replace(naming, stacked=False, pattern=pattern)


def pieces_of(entry: Entry, where: Stored) -> list[tuple[Stored, slice]]:
    """Where the pieces of a slice are stored, each with its rows; mostly one of all rows."""
    if not entry.pieces:
        return [(where, slice(None))]
    pieces, begin = [], 0
    for piece, rows in entry.pieces:
        names = tuple(f"{name}.{piece}" for name in where.names)
        pieces.append((replace(where, names=names), slice(begin, begin + rows)))
        begin += rows
    return pieces


def numbers_layers(name: str) -> bool:
    """Whether a stored name is of one layer rather than of all."""
    return bool(_ONE_LAYER.match(name))


def slot_of(name: str, place: Place) -> Slot:
    """The slot of a stored slice of the decoder or of no layer, but for the expert's number.

    Args:
        name: of the stored tensor.
        place: the slice's indices on its leading axes.
    """
    match = _LAYER.match(name)
    if match is None:
        return Slot(name)
    return Slot(match[2], place[0] if match[1] is None else int(match[1]))
