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

    runs = (run_kinds.INJECTION, run_kinds.EVALUATION, run_kinds.PROFILE)

    def foresee(self, recipe: Recipe, facts: StudentFacts, args: Namespace) -> list[str]:
        """As ``start``; says what is new."""
        card = _card(args)
        return [] if card is None else _lines(card, recipe, args)

    def start(self, run: RunContext) -> RunPart | None:
        """Let checkpoints of the run have the card, which Megatron would leave behind with the
        arguments of the run before."""
        from megatron_moe_inject.host.new_experts import STORED

        card = _card(run.args)
        if card is not None:
            setattr(run.args, STORED, card.plain())
            run.warnings += _lines(card, run.recipe, run.args)
        return None


def _card(args: Namespace) -> NewExperts | None:
    """Of the checkpoint that will be loaded; see ``host.new_experts.loaded_card``."""
    from megatron_moe_inject.host.new_experts import loaded_card

    named = args.load or getattr(args, "pretrained_checkpoint", None)
    return loaded_card(args) if named else None


def _lines(card: NewExperts, recipe: Recipe, args: Namespace) -> list[str]:
    """What is new; and whether no token will reach it."""
    per_layer = len(card.ids())
    lines = [
        f"the student has {per_layer} new experts in each MoE layer ({ranges(card.ids())} of "
        f"{card.experts}), to be trained in layers {ranges(list(card.new))}"
    ]
    train = recipe.train
    routers = train.router or train.layers or train.patterns
    rate = getattr(args, "moe_router_bias_update_rate", 0)
    if card.rows == "closed" and not (routers and rate):
        lines.append(
            "they were closed by their routers' bias, and no token reaches one until that opens: "
            "Megatron moves it while train.router trains and --moe-router-bias-update-rate is "
            "above 0; or add them with --rows mean"
        )
    return lines
