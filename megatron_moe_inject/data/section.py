"""The part of a recipe that says the shares of the training blend."""

from __future__ import annotations

from megatron_moe_inject.recipe.schedule import Schedule, Weight
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.recipe.section import Section

MIXING: Section[dict[str, Weight]] = Section(
    "mixing",
    dict[str, Weight],
    dict,
    "Share of the training blend by domain name, general and preference (pairs of answers), a "
    "number or a schedule; what is not named shares the rest. Built into a blend without weights, "
    "checked in one with weights; by a schedule's mean. With a schedule, or pairs, the order of "
    "samples is our own.",
)


def scheduled(recipe: Recipe) -> bool:
    """Whether shares change by iteration."""
    return any(isinstance(share, Schedule) for share in recipe[MIXING].values())


def ordered(recipe: Recipe) -> bool:
    """Whether samples come in an order of our own: shares change, or both answers of a pair are to
    be in one batch."""
    return scheduled(recipe) or recipe.objective.preference is not None
