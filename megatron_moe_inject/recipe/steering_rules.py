"""What a recipe's steering must satisfy, and what weighs tokens in it."""

from __future__ import annotations

from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.recipe.numbers import SHARES, check_bounds
from megatron_moe_inject.recipe.schema import Recipe


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
