"""The part of a recipe that holds what trains to its start without a pass of the original model."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_moe_inject.recipe.schedule import Schedule, ever_positive
from megatron_moe_inject.recipe.section import Section

PLACES = ("device", "host")
"""Where the original values of what trains can be kept."""


@dataclass
class Retention:
    """Retentions without a pass of the original model, beside ``objective.gamma`` or alone.

    A weight is a number or a schedule, as in ``Objective``.

    Attributes:
        experts: weight of |f(x) - f0(x)|^2 / |f0(x)|^2 between what an expert that trains puts out
            for a general token and what its original would, weighed by the token's gate: a mean
            over all general tokens and over the layers with experts that train.
        l2: weight of half the squared distance of all that trains from where it began.
        originals: where the original values of what trains are kept, for gamma and the routers'
            retention too: ``device`` or ``host``.
    """

    experts: float | Schedule = 0.0
    l2: float | Schedule = 0.0
    originals: str = field(default="device", metadata={"choices": PLACES})

    def in_use(self) -> list[str]:
        """Names of the terms whose weight is ever above 0."""
        return [name for name in ("experts", "l2") if ever_positive(getattr(self, name))]


RETENTION: Section[Retention] = Section(
    "retention", Retention, Retention, "What trains held to its start, see Retention."
)
