"""Experts by profile: what a recipe or the command line asks for, applied to a profile.

``resolve_experts`` turns every ``profile:`` of a recipe into ``layers:``, so that everything that
follows (the freezing policy, the plan, a dumped recipe) sees plain ids. The choice depends on the
recipe and the profile alone, never on the run's layout, and every rank makes the same one.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_moe_inject.experts.choose.new_experts import LoadedNewExperts, renamed
from megatron_moe_inject.experts.choose.profile_file import profile_checksum, read_profile
from megatron_moe_inject.experts.choose.profile_numbers import in_numbers_of
from megatron_moe_inject.experts.choose.routing_profile import (
    GENERAL_CLASS,
    ClassStatistics,
    RoutingProfile,
)
from megatron_moe_inject.experts.choose.select import (
    Limits,
    by_budget,
    by_count,
    by_threshold,
    contrast,
)
from megatron_moe_inject.host.errors import (
    RecipeError,
    child,
    fail,
)
from megatron_moe_inject.host.text import (
    ranges,
)
from megatron_moe_inject.recipe.expert_choice import ExpertChoice, describe_choice
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.layer_numbers import renumbered
from megatron_moe_inject.recipe.schema import Recipe


def resolve_experts(
    recipe: Recipe,
    facts: StudentFacts | None = None,
    *,
    may_be_missing: bool = False,
    like: RoutingProfile | None = None,
) -> Recipe:
    """The recipe in its student's layer numbers, every profile replaced by the experts it gives.

    Args:
        facts: the student that every profile must be of; None skips that check, and leaves numbers
            as they are.
        like: without ``facts``, a profile in whose layer numbers the recipe is wanted.
        may_be_missing: leave the choice of a profile that is not there yet as it is, for a plan.

    Returns:
        The same recipe where no domain names a profile.

    Raises:
        RecipeError: a profile that cannot be read, is of another student or lacks the domain, or
            a choice that it cannot give. The message begins with the recipe's key.
    """
    numbered = facts is not None or like is not None
    pattern = None
    if facts is not None:
        pattern = facts.pattern
    elif like is not None:
        pattern = like.provenance.pattern
    if numbered:
        recipe = renumbered(recipe, pattern)
    grown = LoadedNewExperts(facts)
    profiles: dict[str, tuple[RoutingProfile, str]] = {}
    domains = []
    for i, domain in enumerate(recipe.domains):
        choice, path = domain.experts, f"domains[{i}].experts"
        if choice.profile is not None and may_be_missing and not Path(choice.profile).exists():
            if facts is not None:
                _check_asked(choice, facts, path)
        elif choice.profile is not None:
            key = f"{path}.profile"
            if choice.profile not in profiles:
                try:
                    profile = read_profile(choice.profile)
                except RecipeError as error:
                    raise RecipeError(f"{key}: {error}", key) from None
                profiles[choice.profile] = profile, profile_checksum(profile)
            profile, checksum = profiles[choice.profile]
            if numbered:
                profile = in_numbers_of(profile, pattern, key, choice.profile)
            moved = None
            if facts is not None:
                moved = grown.numbering_of(profile.provenance.router.num_moe_experts)
                before = facts if moved is None else replace(facts, num_moe_experts=len(moved))
                check_student(profile, before, key, choice.profile)
            name = choice.domain or domain.name
            layers = choose_experts(choice, profile, name, path)
            domain = replace(
                domain,
                experts=ExpertChoice(
                    {layer: sorted(renamed(ids, moved)) for layer, ids in layers.items()},
                    origin=describe_choice(choice, name, checksum),
                ),
            )
        elif grown.known and (choice.new is not None or choice.numbering is not None):
            domain = replace(domain, experts=grown.resolved(choice, path))
        domains.append(domain)
    return replace(recipe, domains=domains)


def _check_asked(choice: ExpertChoice, facts: StudentFacts, path: str) -> None:
    """What can be said of a choice without its profile."""
    count = facts.num_moe_experts
    if count is None:
        remedy = "set --num-experts"
        raise fail(path, choice.profile, "is to choose experts of a dense student", remedy)
    for layer in choice.only_layers:
        if layer not in facts.moe_layers:
            remedy = f"MoE layers: {ranges(facts.moe_layers)}"
            raise fail(f"{path}.only_layers", layer, "is no MoE layer of the student", remedy)
    for name in ("n", "at_least"):
        if (getattr(choice, name) or 0) > count:
            problem = "is more than a layer has"
            raise fail(f"{path}.{name}", getattr(choice, name), problem, f"write {count} or less")


def check_student(profile: RoutingProfile, facts: StudentFacts, key: str, file: str) -> None:
    """Check that a profile is of a student of this shape.

    Raises:
        RecipeError: a difference in layers, experts or top-k, with both values.
    """
    provenance = profile.provenance
    pairs = (
        ("layers", provenance.num_layers, facts.num_layers),
        ("experts in a layer", provenance.router.num_moe_experts, facts.num_moe_experts or 0),
        ("MoE layers", ranges(provenance.moe_layers), ranges(facts.moe_layers) or "(none)"),
        ("experts per token", provenance.router.topk, facts.router_topk),
    )
    for what, theirs, ours in pairs:
        if theirs != ours:
            raise fail(
                key,
                file,
                f"is of a student with {what} {theirs}, and this one has {ours}",
                "use a profile of this student",
            )


def choose_experts(
    choice: ExpertChoice, profile: RoutingProfile, domain: str, path: str = ""
) -> dict[int, list[int]]:
    """Decoder layer -> global expert ids, layers rising, ids in the order they were taken.

    Args:
        choice: a checked choice (``recipe.rules.check_profile_choice``).
        domain: class of the profile.
        path: where the choice stands in a recipe; messages begin with it.

    Raises:
        RecipeError: a class or layer that the profile lacks, or constraints that its counts
            cannot meet.
    """
    key = child(path, "domain")
    if domain == GENERAL_CLASS:
        raise fail(key, domain, "is no domain", "name the class that the experts are for")
    statistics = profile.of(domain, key)
    rows, layers = _rows(choice, profile, child(path, "only_layers"))
    limits = Limits(choice.at_least or 0, choice.at_most, choice.ep or 1)
    try:
        if choice.method == "top_n":
            scores = _scores(choice.score or "token", profile, statistics)
            assert choice.n is not None, "the recipe's rules ask for n"
            chosen = by_count(scores[rows], n=choice.n, limits=limits, layers=layers)
        elif choice.method == "budget":
            scores = _scores(choice.score or "token", profile, statistics)
            experts = affordable(choice, profile)
            chosen = by_budget(scores[rows], experts=experts, limits=limits, layers=layers)
        else:
            threshold = choice.threshold
            assert choice.method is not None, "the recipe's rules ask for a method"
            assert threshold is not None, "they ask for its threshold"
            sums = _sums(choice.method, profile, statistics)
            chosen = by_threshold(sums[rows], threshold=threshold, limits=limits, layers=layers)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}" if path else str(error), path or error.key) from None
    return {layer: ids for layer, ids in zip(layers, chosen, strict=True) if ids}


def shortened(choice: ExpertChoice, profile: RoutingProfile, domain: str) -> list[int]:
    """Layers that ``at_most`` keeps below the threshold."""
    if choice.threshold is None or choice.at_most is None:
        return []
    limited = choose_experts(choice, profile, domain)
    free = choose_experts(replace(choice, at_most=None), profile, domain)
    return [layer for layer, ids in limited.items() if len(ids) < len(free[layer])]


def affordable(choice: ExpertChoice, profile: RoutingProfile) -> int:
    """How many experts the budget pays for."""
    assert choice.budget is not None, "the recipe's rules ask for a budget"
    provenance = profile.provenance
    layers, experts = provenance.shape
    total = layers * experts * provenance.expert_parameters
    if choice.budget_of == "all":
        total = provenance.parameters
    return int(choice.budget * total / provenance.expert_parameters + 1e-9)


def contrast_scores(profile: RoutingProfile, domain: ClassStatistics) -> np.ndarray:
    """``select.contrast`` of a domain with the profile's general class, float64 ``[L, E]``.

    Raises:
        RecipeError: the profile has no general class, or one without tokens.
    """
    if GENERAL_CLASS not in profile.classes:
        raise RecipeError(
            f"the profile has no class {GENERAL_CLASS!r} to contrast with; "
            "merge it with a profile of general data"
        )
    general = profile.classes[GENERAL_CLASS]
    if not general.tokens.all():
        layer = profile.provenance.moe_layers[int(general.tokens.argmin())]
        raise RecipeError(
            f"layer {layer}: the class {GENERAL_CLASS!r} has no tokens to contrast with; "
            "merge it with a profile of general data"
        )
    return contrast(domain.selections, general.selections)


def _sums(name: str, profile: RoutingProfile, domain: ClassStatistics) -> np.ndarray:
    """Scores ``[L, E]`` to be normalised per layer."""
    if name == "contrast":
        return np.maximum(contrast_scores(profile, domain), 0)
    return domain.selections if name == "token" else domain.gate_sums


def _scores(name: str, profile: RoutingProfile, domain: ClassStatistics) -> np.ndarray:
    """Scores ``[L, E]`` that are comparable between layers: shares, or nats."""
    if name == "contrast":
        return _sums(name, profile, domain)
    return domain.selection_share() if name == "token" else domain.gate_share()


def _rows(choice: ExpertChoice, profile: RoutingProfile, key: str) -> tuple[list[int], list[int]]:
    """Rows of the profile to choose in, and their layers, rising."""
    known = profile.provenance.moe_layers
    for layer in choice.only_layers:
        if layer not in known:
            raise fail(key, layer, "is no MoE layer of the profile", f"MoE layers: {ranges(known)}")
    layers = [layer for layer in known if not choice.only_layers or layer in choice.only_layers]
    return [known.index(layer) for layer in layers], layers
