"""The part of a recipe that steers tokens to experts, and its rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_moe_inject.recipe_numbers import SHARES, check_bounds
from megatron_moe_inject.schedule import Schedule, ever_positive
from megatron_moe_inject.typed import fail

if TYPE_CHECKING:
    from megatron_moe_inject.recipe import Recipe

STOCK_BALANCES = ("general", "all")
STEERING_CONFIDENCES = ("none", "label", "top")


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
        confidence: weighs each domain token by its teacher's confidence there, one of
            ``STEERING_CONFIDENCES``: by its probability of the label, or of its most likely token.
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
    confidence: str = "none"
    balance: float | Schedule = 0.01
    stock_balance: str = "general"
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


def check_steering(recipe: Recipe) -> None:
    """Check what does not depend on the student; the weights are checked with the objective's.

    Raises:
        RecipeError: the first mistake found.
    """
    steering = recipe.steering
    if not 0 < steering.target_mass <= 1:
        raise fail(
            "steering.target_mass", steering.target_mass, "is not in (0, 1]",
            "write a share of a router's probability such as 0.5",
        )  # fmt: skip
    check_bounds("steering.target_mass", steering.target_mass, SHARES)
    if not 0 <= steering.bias_counts <= 1:
        raise fail(
            "steering.bias_counts", steering.bias_counts, "is not between 0 and 1",
            "0 counts general tokens only, 1 all alike",
        )  # fmt: skip
    check_bounds("steering.bias_counts", steering.bias_counts, SHARES, besides=(0,))
    if steering.stock_balance == "all" and steering.bias_counts:
        raise fail(
            "steering.bias_counts", steering.bias_counts, "has no use with stock_balance: all",
            "which counts all tokens alike: remove one of them",
        )  # fmt: skip
    if steering.detail_every < 0:
        raise fail("steering.detail_every", steering.detail_every, "is negative", "0 = never")
    for i, layer in enumerate(steering.layers):
        if layer < 0 or layer in steering.layers[:i]:
            problem = "is negative" if layer < 0 else "is named twice"
            raise fail(f"steering.layers[{i}]", layer, problem, "decoder layers count from 0")
    _check_use(recipe)


def _check_use(recipe: Recipe) -> None:
    steering = recipe.steering
    chosen = {layer for d in recipe.domains for layer in d.experts.layers}
    by_profile = any(d.experts.profile is not None for d in recipe.domains)
    train = recipe.train
    routers = train.router or train.router_rows or train.layers or train.patterns
    if steering.retains and not routers:
        raise fail(
            "steering.retention", steering.retention, "holds routers that do not train",
            "set train.router: true or remove it",
        )  # fmt: skip
    if steering.steers and steering.confidence != "none":
        _check_confidence(recipe)
    if by_profile:
        return
    name = "coeff" if steering.steers else "report"
    if (steering.steers or steering.report) and not chosen:
        raise fail(
            f"steering.{name}", getattr(steering, name), "but no domain chose experts",
            "write domains[0].experts, or remove it",
        )  # fmt: skip
    for i, layer in enumerate(steering.layers):
        if layer not in chosen:
            raise fail(
                f"steering.layers[{i}]", layer, "has no experts that a domain chose",
                f"the layers that have are {sorted(chosen)}",
            )  # fmt: skip


def _check_confidence(recipe: Recipe) -> None:
    kind = recipe.steering.confidence
    for i, domain in enumerate(recipe.domains):
        if domain.teacher is None and (domain.experts.layers or domain.experts.profile):
            raise fail(
                "steering.confidence", kind, f"asks for a teacher that {domain.name!r} lacks",
                f"write domains[{i}].teacher, or confidence: none",
            )  # fmt: skip


def weighed_by_token(recipe: Recipe) -> list[str]:
    """Names of the steered domains whose tokens have a confidence each."""
    return _weighed(recipe, windowed=False)


def weighed_by_mean(recipe: Recipe) -> list[str]:
    """Names of the steered domains whose tokens all have the mean confidence of earlier steps."""
    return _weighed(recipe, windowed=True)


def _weighed(recipe: Recipe, *, windowed: bool) -> list[str]:
    steering = recipe.steering
    if not steering.steers or steering.confidence == "none":
        return []
    return [
        domain.name
        for domain in recipe.domains
        if any(layer in steering.layers or not steering.layers for layer in domain.experts.layers)
        and any(recipe.teachers[name].window for name in domain.teacher_weights) == windowed
    ]
