"""From the recipe to what trains, and to what keeps frozen experts in FP8."""

from __future__ import annotations

from megatron_moe_inject.experts.fp8.native import NativeFp8
from megatron_moe_inject.experts.train.freeze import EVERYTHING, FreezePolicy
from megatron_moe_inject.experts.train.frozen_fp8 import FrozenFp8
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.schema import Recipe


def freeze_policy(recipe: Recipe) -> FreezePolicy:
    """The policy that ``recipe.train`` and the domains' experts ask for."""
    if recipe.train.everything:
        return EVERYTHING
    experts: dict[int, frozenset[int]] | None = {}
    if recipe.train.experts == "all":
        experts = None
    elif recipe.train.experts == "selected":
        experts = {layer: frozenset(ids) for layer, ids in recipe.experts_by_layer().items()}
    train = recipe.train
    chosen = recipe.experts_by_layer() if train.router_rows else {}
    return FreezePolicy(
        experts,
        frozenset(train.components()),
        frozenset(train.layers),
        tuple(train.patterns),
        {layer: frozenset(ids) for layer, ids in chosen.items()},
    )


def frozen_fp8(recipe: Recipe, policy: FreezePolicy, facts: StudentFacts) -> FrozenFp8 | None:
    """What keeps the frozen experts in FP8, where ``train.frozen_experts`` asks for it.

    Raises:
        RecipeError: ``train.fp8_source`` does not hold the student's frozen experts.
    """
    train = recipe.train
    if train.frozen_experts != "fp8":
        return None
    source = None
    if train.fp8_source is not None:
        source = NativeFp8(train.fp8_source, facts.pattern)
        chosen = policy.experts or {}
        assert facts.num_moe_experts is not None, "the recipe's rules refuse a dense student"
        source.check(
            (layer, expert)
            for layer in facts.moe_layers
            for expert in range(facts.num_moe_experts)
            if layer not in policy.layers and expert not in chosen.get(layer, ())
        )
    assert facts.precision.fp8_recipe is not None, "they refuse a student without FP8, too"
    return FrozenFp8(policy, facts.precision.fp8_recipe, source, facts.pattern)
