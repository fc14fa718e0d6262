"""The parts of a recipe that steer tokens to experts and open the door of new ones."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_moe_inject.recipe.schedule import Schedule, ever_positive
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.recipe.section import Section

STOCK_BALANCES = ("general", "all")
STEERING_CONFIDENCES = ("none", "label", "top")


@dataclass
class Routing:
    """What routers do beyond what is stored of them.

    Attributes:
        open: how far the door of the new experts that the domains chose is open: a schedule that
            ends at 1, as in ``{points: {0: 0.0, 100: 1.0}}``, or 1 for at once. It multiplies their
            unnormalised probability where a router chooses and weighs; experts that a bias closed
            lose that bias. None = routers are as they are stored.
    """

    open: float | Schedule | None = None


ROUTING: Section[Routing] = Section(
    "routing", Routing, Routing, "How new experts are opened, see Routing."
)


@dataclass
class Steering:
    """The router-bias auxiliary loss: domain tokens to their domain's experts, gently.

    A weight is a number or a schedule, as in ``Objective``. Each loss is a mean over the tokens it
    concerns, in every layer.

    Attributes:
        coeff: weight of relu(log target_mass - log mass) on domain tokens, where mass is a router's
            probability on the experts that the domain chose in that layer.
        target_mass: where steering stops.
        layers: decoder layers to steer in; empty = all in which a domain chose experts.
        confidence: weighs each domain token by its teacher's confidence there: ``none`` (not),
            ``label`` (its probability of the label) or ``top`` (that of its most likely token).
            A teacher that runs the whole step ahead (``window: 0``) weighs each token, on every
            stage; another weighs all tokens of a domain alike, by its mean confidence in those of
            earlier steps (``teachers.confidence.RunningConfidence``).
        balance: weight of the balance of domain tokens within their targets, while coeff is used.
        stock_balance: ``general``: Megatron's balance losses see general tokens only while tokens
            are steered; ``all``: they see all, as ever.
        bias_counts: weight of a domain token in the counts that move a router's expert bias, with
            ``stock_balance: general``.
        retention: weight of KL(original router || router) on general tokens, in all layers with
            routers that train; the original router sees the same states.
        report: log where tokens go also in a run that steers nothing.
        detail_every: steps between entries by layer in TensorBoard and W&B; 0 = none.
    """

    coeff: float | Schedule = 0.0
    target_mass: float = 0.5
    layers: list[int] = field(default_factory=list)
    confidence: str = field(default="none", metadata={"choices": STEERING_CONFIDENCES})
    balance: float | Schedule = 0.01
    stock_balance: str = field(default="general", metadata={"choices": STOCK_BALANCES})
    bias_counts: float = 0.0
    retention: float | Schedule = 0.0
    report: bool = False
    detail_every: int = 100

    @property
    def steers(self) -> bool:
        """Whether tokens are ever steered."""
        return ever_positive(self.coeff)

    @property
    def retains(self) -> bool:
        """Whether routers are ever held to the original ones."""
        return ever_positive(self.retention)

    @property
    def watches(self) -> bool:
        """Whether the log shows where tokens go."""
        return self.steers or self.retains or self.report


STEERING: Section[Steering] = Section(
    "steering", Steering, Steering, "Domain tokens to their domain's experts, see Steering."
)


def weighed_by_token(recipe: Recipe) -> list[str]:
    """Names of the steered domains whose tokens have a confidence each."""
    return _weighed(recipe, windowed=False)


def weighed_by_mean(recipe: Recipe) -> list[str]:
    """Names of the steered domains whose tokens all have the mean confidence of earlier steps."""
    return _weighed(recipe, windowed=True)


def _weighed(recipe: Recipe, *, windowed: bool) -> list[str]:
    steering = recipe[STEERING]
    if not steering.steers or steering.confidence == "none":
        return []
    return [
        domain.name
        for domain in recipe.domains
        if any(layer in steering.layers or not steering.layers for layer in domain.experts.layers)
        and any(recipe.teachers[name].window for name in domain.teacher_weights) == windowed
    ]
