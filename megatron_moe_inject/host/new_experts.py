"""Which experts of a checkpoint are new: the card that ``moe-inject add-experts`` writes.

It lies in Megatron's arguments, so that every checkpoint of a run that goes on has it. Where
routers choose groups first, one new expert stands at the end of each group, and the ids of the old
ones move; the card says where to.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_moe_inject.host import typed
from megatron_moe_inject.host.errors import RecipeError, fail
from megatron_moe_inject.host.layer_pattern import LayerPattern, pattern_of
from megatron_moe_inject.host.text import ranges

STORED = "inject_new_experts"
"""The card's name in Megatron's arguments."""
VERSION = 1
_NEEDED = {"remedy": "write it with moe-inject add-experts"}


@dataclass(frozen=True)
class NewExperts:
    """The card.

    Attributes:
        version: of the card.
        experts: of a layer, old and new.
        moved: by old id the id that this expert has now.
        new: 0-based decoder layer -> ids of its new experts, for layers that got them to be
            trained.
        filled: other MoE layers, whose new experts are there because Megatron's layers all have
            the same number.
        domains: by domain the ids that are for it, in each layer of ``new``; empty where none was
            named.
        donors: by layer of ``new`` the old ids that its new experts were copied from; empty where
            they were not.
        layers: the symbols of the hybrid model that numbers the layers; ``None`` for blocks of a
            GPT model.
        weights, rows, noise, seed: how they began, in the words of the command.
        capacity_factor: ``--moe-expert-capacity-factor`` of the base.
        base: the folder that they were added to.
        base_sha256: of its model, see ``stored_checkpoint.model_checksum``.
    """

    version: int = field(metadata=_NEEDED)
    experts: int = field(metadata=_NEEDED)
    moved: list[int] = field(metadata=_NEEDED)
    new: dict[int, list[int]] = field(metadata=_NEEDED)
    filled: list[int] = field(metadata=_NEEDED)
    domains: dict[str, list[int]] = field(metadata=_NEEDED)
    donors: dict[int, list[int]] = field(metadata=_NEEDED)
    layers: str | None = field(metadata=_NEEDED)
    weights: str = field(metadata=_NEEDED)
    rows: str = field(metadata=_NEEDED)
    noise: float = field(metadata=_NEEDED)
    seed: int = field(metadata=_NEEDED)
    capacity_factor: float | None = field(metadata=_NEEDED)
    base: str = field(metadata=_NEEDED)
    base_sha256: str = field(metadata=_NEEDED)

    @property
    def base_experts(self) -> int:
        """Experts of a layer before."""
        return len(self.moved)

    def plain(self) -> dict[str, Any]:
        """As it is stored."""
        return asdict(self)

    def check(self) -> None:
        """RecipeError where ids do not fit each other."""
        known, moved = set(range(self.experts)), set(self.moved)
        if len(moved) < len(self.moved) or not moved or not moved < known:
            raise RecipeError("moved: names an id twice, or one that is not there")
        if any(
            not set(some) <= known - moved for some in [*self.new.values(), *self.domains.values()]
        ):
            raise RecipeError("new, domains: they name experts that are not new")

    def ids(self) -> list[int]:
        """Ids of the new experts, which are the same in every layer."""
        return sorted(set(range(self.experts)) - set(self.moved))

    def among(self, chosen: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
        """Which of some experts are new, by layer; layers without one are left out."""
        found = {
            layer: [expert for expert in ids if expert in chosen.get(layer, ())]
            for layer, ids in self.new.items()
        }
        return {layer: ids for layer, ids in found.items() if ids}

    def in_layers_of(self, pattern: LayerPattern | None) -> NewExperts:
        """The card in the layer numbers of another run of the same weights.

        Args:
            pattern: that run's; ``None`` for a GPT model.

        Raises:
            RecipeError: its layers are others.
        """
        symbols = None if pattern is None else pattern.symbols
        if symbols == self.layers:
            return self
        one = pattern if self.layers is None else LayerPattern(self.layers)
        if one is None or one.blocks is None or (symbols is not None and self.layers is not None):
            raise RecipeError(
                f"the new experts of the checkpoint are in layers of {self.layers or 'a GPT model'}"
                f", and this student has {symbols or 'the blocks of a GPT model'}; load a "
                "checkpoint of this student"
            )
        pairs = [mlp for _, mlp in one.blocks]
        number = (
            dict(enumerate(pairs))
            if self.layers is None
            else {layer: block for block, layer in enumerate(pairs)}
        )
        return NewExperts(
            **{
                **vars(self),
                "layers": symbols,
                "new": {number[layer]: ids for layer, ids in self.new.items()},
                "filled": [number[layer] for layer in self.filled],
                "donors": {number[layer]: ids for layer, ids in self.donors.items()},
            }
        )


def card_in(stored: Namespace | None, where: str) -> NewExperts | None:
    """The card in a checkpoint's arguments, ``None`` without one.

    Args:
        where: what the message begins with.

    Raises:
        RecipeError: it is no card of this version.
    """
    plain = getattr(stored, STORED, None)
    if plain is None:
        return None
    try:
        return read_card(plain)
    except RecipeError as error:
        raise RecipeError(f"{where} has a card of new experts {error}") from None


def read_card(plain: object) -> NewExperts:
    """A card as it was stored.

    Raises:
        RecipeError: it is of another version, or cannot be; the text follows what has it.
    """
    if not isinstance(plain, dict) or plain.get("version") != VERSION:
        raise RecipeError(f"of another version; this reads version {VERSION}")
    try:
        card: NewExperts = typed.build(NewExperts, plain)
        card.check()
    except RecipeError as error:
        raise RecipeError(f"that cannot be: {error}") from None
    return card


def card_of_run(args: Namespace) -> NewExperts | None:
    """``loaded_card``; ``None`` also where the run names no checkpoint."""
    named = getattr(args, "load", None) or getattr(args, "pretrained_checkpoint", None)
    return loaded_card(args) if named else None


def loaded_card(args: Namespace) -> NewExperts | None:
    """The card of the checkpoint that a run will load, in the run's layer numbers. No collective.

    Raises:
        RecipeError: the checkpoint cannot be read, or the run's student has other layers or another
            number of experts.
    """
    from megatron_moe_inject.host.stored_checkpoint import checkpoint_to_load

    checkpoint = checkpoint_to_load(args)
    if checkpoint is None:
        return None
    card = card_in(checkpoint.arguments(), f"{checkpoint.flag} {checkpoint.folder}")
    if card is None:
        return None
    if args.num_experts != card.experts:
        raise fail(
            "--num-experts", args.num_experts,
            f"is not what {checkpoint.folder} has: {card.experts}, of which {ranges(card.ids())} "
            "were added",
            f"pass --num-experts {card.experts}",
        )  # fmt: skip
    return card.in_layers_of(pattern_of(args))
