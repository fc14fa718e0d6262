"""What a recipe's retention must satisfy, and what it needs."""

from __future__ import annotations

from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.recipe.schedule import ever_positive
from megatron_moe_inject.recipe.schema import Recipe


def keeps_originals(recipe: Recipe) -> bool:
    """Whether some retention needs the original values of what trains."""
    objective = recipe.objective
    held = ever_positive(objective.gamma) or bool(objective.retention.in_use())
    return held or recipe.steering.retains


def check_retention(recipe: Recipe) -> None:
    """Check what does not depend on the student; the weights are checked with the objective's.

    Raises:
        RecipeError: nothing that trains can hold experts, or no original is kept anywhere.
    """
    train, retention = recipe.train, recipe.objective.retention
    if retention.originals == "host" and not keeps_originals(recipe):
        raise fail(
            "objective.retention.originals", "host", "keeps nothing, since no retention is used",
            "set objective.gamma or another retention, or remove it",
        )  # fmt: skip
    trained = train.experts != "none" or train.layers or train.patterns
    if "experts" in retention.in_use() and not trained:
        raise fail(
            "objective.retention.experts", retention.experts, "holds experts, but none train",
            "set train.experts to selected or all, or remove it",
        )  # fmt: skip
