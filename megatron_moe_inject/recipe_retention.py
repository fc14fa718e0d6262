"""The part of a recipe that holds what trains to its start without a pass of the original model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_moe_inject.schedule import Schedule, ever_positive
from megatron_moe_inject.typed import fail

if TYPE_CHECKING:
    from megatron_moe_inject.recipe import Recipe


PLACES = ("device", "host")
"""Where the original values of what trains can be kept."""


@dataclass
class Retention:
    """Retentions without a pass of the original model, beside gamma or alone.

    A weight is a number or a schedule, as in ``Objective``.

    Attributes:
        experts: weight of |f(x) - f0(x)|^2 / |f0(x)|^2 between what an expert that trains puts out
            for a general token and what its original would, weighed by the token's gate: a mean
            over all general tokens and over the layers with experts that train.
        l2: weight of half the squared distance of all that trains from where it began.
        originals: where the original values of what trains are kept, for gamma and the routers'
            retention too: one of ``PLACES``.
    """

    experts: float | Schedule = 0.0
    l2: float | Schedule = 0.0
    originals: str = "device"

    def in_use(self) -> list[str]:
        """Names of the terms whose weight is ever above 0."""
        return [name for name in ("experts", "l2") if ever_positive(getattr(self, name))]


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
