"""New experts of the student's checkpoint, and ids of before they came, as recipes name them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from megatron_moe_inject.host.errors import RecipeError, fail, suggest
from megatron_moe_inject.host.new_experts import NewExperts, loaded_card
from megatron_moe_inject.host.text import ranges
from megatron_moe_inject.recipe.expert_choice import ExpertChoice, describe_new
from megatron_moe_inject.recipe.facts import StudentFacts

_WITHOUT = (
    "but the student's checkpoint has none: load one that moe-inject add-experts wrote, or that "
    "was trained from it with this plugin"
)


def renamed(ids: Sequence[int], moved: Sequence[int] | None) -> list[int]:
    """Ids of before as they are now; the same without ``moved``."""
    return list(ids) if moved is None else [moved[expert] for expert in ids]


class LoadedNewExperts:
    """The card of new experts in the checkpoint that a run will load, read when it is asked for.

    Args:
        facts: the student; ``None`` where nothing is known of it.
    """

    def __init__(self, facts: StudentFacts | None) -> None:
        self._facts = facts
        self._card: NewExperts | None = None
        self._read = False

    @property
    def known(self) -> bool:
        """Whether flags say which checkpoint will be loaded."""
        options = {} if self._facts is None else self._facts.options
        return bool(options.get("load") or options.get("pretrained_checkpoint"))

    def card(self) -> NewExperts | None:
        """``None`` without new experts.

        Raises:
            RecipeError: the checkpoint cannot be read, or has more experts than the student.
        """
        if not self._read and self.known:
            assert self._facts is not None, "known"
            self._card = loaded_card(Namespace(**self._facts.options))
        self._read = True
        return self._card

    def numbering_of(self, experts: int) -> Sequence[int] | None:
        """By old id the new one, for something that was made of this student when it had so many
        experts; ``None`` where it has as many now, or never had."""
        assert self._facts is not None, "asked of a student"
        if experts == self._facts.num_moe_experts:
            return None
        card = self.card()
        return card.moved if card is not None and card.base_experts == experts else None

    def resolved(self, choice: ExpertChoice, path: str) -> ExpertChoice:
        """A choice of new experts, or one in old ids, as ids of now.

        Args:
            choice: one that names either, without a profile.
            path: of the choice in the recipe.

        Raises:
            RecipeError: the checkpoint has no new experts, or not those.
        """
        if choice.new is None:
            return self._of_now(choice, path)
        card = self.card()
        key = f"{path}.new"
        if card is None:
            raise RecipeError(f"{key}: {choice.new} names new experts, {_WITHOUT}", key)
        if choice.new == "all":
            wanted = card.ids()
        elif choice.new in card.domains:
            wanted = card.domains[choice.new]
        else:
            known = suggest(choice.new, ["all", *card.domains], "the checkpoint's are")
            raise fail(key, choice.new, "is no domain that new experts were added for", known)
        for layer in choice.only_layers:
            if layer not in card.new:
                raise fail(
                    f"{path}.only_layers", layer, "got no new experts to train",
                    f"layers that did: {ranges(list(card.new))}",
                )  # fmt: skip
        layers = choice.only_layers or card.new
        return ExpertChoice(
            {layer: list(wanted) for layer in sorted(layers)}, origin=describe_new(choice.new)
        )

    def _of_now(self, choice: ExpertChoice, path: str) -> ExpertChoice:
        """``layers`` in ids of now."""
        if choice.numbering == "new":
            return ExpertChoice(choice.layers, choice.origin)
        card, key = self.card(), f"{path}.numbering"
        if card is None:
            raise RecipeError(
                f"{key}: old is what ids were before new experts came, {_WITHOUT}", key
            )
        for layer, ids in choice.layers.items():
            for expert in ids:
                if expert >= card.base_experts:
                    raise fail(
                        f"{path}.layers.{layer}", ids, f"names expert {expert}",
                        f"old ids are 0 to {card.base_experts - 1}",
                    )  # fmt: skip
        layers = {layer: renamed(ids, card.moved) for layer, ids in choice.layers.items()}
        return ExpertChoice(layers, choice.origin)
