"""New experts of a checkpoint as a feature: the card of them goes on with the run's checkpoints."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from megatron_moe_inject.host.text import ranges
from megatron_moe_inject.recipe import run_kinds
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.feature import Feature
from megatron_moe_inject.recipe.schema import Recipe

if TYPE_CHECKING:
    from megatron_moe_inject.host.new_experts import NewExperts
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart


class NewExpertsFeature(Feature):
    """What ``moe-inject add-experts`` wrote beside the model."""

    runs = (
        run_kinds.INJECTION,
        run_kinds.EVALUATION,
        run_kinds.PROFILE,
        run_kinds.GENERATION,
    )

    def plan_lines(self, recipe: Recipe, facts: StudentFacts | None) -> dict[str, list[str]]:
        """What is new, and whose."""
        options = {} if facts is None else facts.options
        if not (options.get("load") or options.get("pretrained_checkpoint")):
            return {}
        from megatron_moe_inject.host.new_experts import loaded_card

        card = loaded_card(Namespace(**options))
        return {} if card is None else {"new experts": _lines(card)}

    def start(self, run: RunContext) -> RunPart | None:
        """Let checkpoints of the run have the card, which Megatron would leave behind with the
        arguments of the run before."""
        from megatron_moe_inject.host.new_experts import STORED, card_of_run

        card = card_of_run(run.args)
        if card is not None:
            setattr(run.args, STORED, card.plain())
        return None


def _lines(card: NewExperts) -> list[str]:
    """What is new, and whose."""
    lines = [
        f"{len(card.ids())} new experts in each MoE layer ({ranges(card.ids())} of "
        f"{card.experts}), to be trained in layers {ranges(list(card.new))}; rows: {card.rows}"
    ]
    return lines + [f"for {domain}: {ranges(ids)}" for domain, ids in card.domains.items()]
