"""What a recipe must satisfy before anything is known about the student.

Types, unknown and missing keys are ``host.typed.build``'s business; here are the rules between
values: names that refer to each other, datasets with one owner, weights that leave no token
without a loss, and that something trains at all.
"""

from __future__ import annotations

from dataclasses import asdict

from megatron_moe_inject.host.errors import NAME, RecipeError, child, fail, listing
from megatron_moe_inject.host.files import is_file_path
from megatron_moe_inject.recipe.committee_rules import check_committee
from megatron_moe_inject.recipe.expert_choice import (
    BUDGETS,
    METHODS,
    NUMBERINGS,
    SCORES,
    ExpertChoice,
)
from megatron_moe_inject.recipe.features import FEATURES
from megatron_moe_inject.recipe.fields import check_choice, check_fields, check_temperature
from megatron_moe_inject.recipe.numbers import MIXTURES, check_bounds
from megatron_moe_inject.recipe.preference import CLASS
from megatron_moe_inject.recipe.schedule import Weight, ever_positive, points
from megatron_moe_inject.recipe.schema import LAYER_NUMBERS, Domain, Objective, Recipe


def validate(recipe: Recipe) -> None:
    """Check everything that does not depend on the student.

    Raises:
        RecipeError: the first mistake found.
    """
    if recipe.version != 1:
        raise fail("version", recipe.version, "is not known here", "this version reads version: 1")
    if recipe.layer_numbers is not None:
        check_choice("layer_numbers", recipe.layer_numbers, LAYER_NUMBERS)
    if not recipe.domains:
        raise fail("domains", [], "is empty", "a recipe needs at least one domain")
    check_fields("", {"domains": recipe.domains, "teachers": recipe.teachers})
    _check_domains(recipe)
    check_fields("", {"objective": recipe.objective, "train": recipe.train} | recipe.sections)
    _check_objective(recipe)
    for feature in FEATURES:
        feature.rules(recipe)


def _check_objective(recipe: Recipe) -> None:
    objective = recipe.objective
    check_temperature("objective.temperature", objective.temperature)
    for name in ("jsd_beta", "skew"):
        share = getattr(objective, name)
        if not 0 < share < 1:
            remedy = "write a share strictly between; forward_kl and reverse_kl are the limits"
            raise fail(f"objective.{name}", share, "is not between 0 and 1", remedy)
        check_bounds(f"objective.{name}", share, MIXTURES)
    if objective.ce_share is not None:
        _check_ce_share(objective, objective.ce_share)
    taught = [domain for domain in recipe.domains if domain.teacher is not None]
    if ever_positive(objective.weights()[0]) and not taught:
        name = "alpha" if objective.ce_share is None else "ce_share"
        raise fail(
            f"objective.{name}",
            getattr(objective, name),
            "weighs distillation but no domain has a teacher",
            "add domains[0].teacher or set alpha to 0",
        )
    for i, domain in enumerate(recipe.domains):
        _check_domain_weights(recipe, i, domain)


def _check_domains(recipe: Recipe) -> None:
    names: dict[str, str] = {"general": "the name of all other data"}
    claims: dict[int | str, str] = {}
    if (pairs := recipe.objective.preference) is not None:
        names[CLASS] = "the name of pairs of answers"
    for i, domain in enumerate(recipe.domains):
        path = f"domains[{i}]"
        if not NAME.fullmatch(domain.name):
            raise fail(f"{path}.name", domain.name, "is no name", "use letters, digits, _ and -")
        if domain.name in names:
            taken = names[domain.name]
            raise fail(f"{path}.name", domain.name, f"is already {taken}", "choose another name")
        names[domain.name] = f"the name of {path}"
        if not domain.data:
            raise fail(f"{path}.data", domain.data, "is empty", "name blend entries, as in [1]")
        _claim(domain.data, f"{path}.data", claims)
        _check_experts(f"{path}.experts", domain.experts)
        check_committee(recipe, path, domain)
    _claim(recipe.general_data, "general_data", claims)
    if pairs is not None:
        if not pairs.data:
            where = "objective.preference.data"
            raise fail(where, pairs.data, "is empty", "name blend entries of pairs, as in [2]")
        _claim(pairs.data, "objective.preference.data", claims)


def _claim(data: list[int | str], path: str, claims: dict[int | str, str]) -> None:
    for j, entry in enumerate(data):
        where = f"{path}[{j}]"
        if isinstance(entry, int) and entry < 0:
            raise fail(where, entry, "is negative", "positions in the blend count from 0")
        if entry == "":
            raise fail(where, entry, "is empty", "write a path prefix or a position")
        if entry in claims:
            raise fail(
                where, entry, f"is already claimed by {claims[entry]}", "each entry has one owner"
            )
        claims[entry] = where


def _check_experts(path: str, choice: ExpertChoice) -> None:
    for layer, ids in choice.layers.items():
        _check_layer(f"{path}.layers", layer, ids)
    if choice.profile is not None:
        if choice.layers or choice.origin is not None:
            name = "layers" if choice.layers else "origin"
            raise fail(
                f"{path}.{name}",
                getattr(choice, name),
                "stands beside a profile, which chooses the experts",
                "keep layers or profile",
            )
        check_profile_choice(path, choice)
    if choice.numbering is not None:
        check_choice(f"{path}.numbering", choice.numbering, NUMBERINGS)
        if choice.undecided:
            raise fail(
                f"{path}.numbering", choice.numbering, "is of layers, which are not written",
                "remove it: a profile says whose ids it has, and new experts have new ones",
            )  # fmt: skip
    if choice.new is not None:
        _check_new(path, choice)
    if choice.undecided:
        return
    for name, value in asdict(choice).items():
        if name not in ("layers", "origin", "numbering") and value not in (None, []):
            raise fail(
                f"{path}.{name}", value, "needs a profile", f"write {path}.profile or remove it"
            )


def _check_new(path: str, choice: ExpertChoice) -> None:
    """``new`` stands alone, but for ``only_layers``."""
    for name, value in asdict(choice).items():
        if name not in ("new", "only_layers") and value not in (None, [], {}):
            raise fail(
                f"{path}.{name}", value, "stands beside new, which names the experts",
                "keep one of them",
            )  # fmt: skip
    if choice.new != "all" and not NAME.fullmatch(choice.new or ""):
        raise fail(f"{path}.new", choice.new, "is no name", "write all, or a domain's name")


def _check_layer(path: str, layer: int, ids: list[int]) -> None:
    where = f"{path}.{layer}"
    if layer < 0:
        raise fail(where, layer, "is a negative layer", "decoder layers count from 0")
    if not ids:
        raise fail(where, ids, "chooses no expert", "list expert ids or remove the layer")
    for expert in ids:
        if expert < 0:
            raise fail(where, ids, f"has the negative id {expert}", "experts count from 0")
        if ids.count(expert) > 1:
            raise fail(where, ids, f"lists expert {expert} twice", "list each expert once")


def check_profile_choice(path: str, choice: ExpertChoice) -> None:
    """Check how experts are to be chosen from a profile; the profile itself is not read.

    Args:
        path: where the choice stands, such as ``domains[0].experts``; empty for bare names.

    Raises:
        RecipeError: a method without its number, a number that the method does not use, or a
            value out of range.
    """

    def key(name: str) -> str:
        return child(path, name)

    assert choice.profile is not None, "a choice from a profile names it"
    if not is_file_path(choice.profile):
        raise fail(key("profile"), choice.profile, "is no file", "name a routing profile")
    method = choice.method
    if method is None:
        raise RecipeError(f"{key('method')}: missing; choose {listing(METHODS)}", key("method"))
    check_choice(key("method"), method, METHODS)
    by_method = {"top_n": ("n", "score"), "budget": ("budget", "budget_of", "score")}
    used = by_method.get(method, ("threshold",))
    for name in ("threshold", "n", "budget", "budget_of", "score"):
        value = getattr(choice, name)
        if value is not None and name not in used:
            remedy = f"it takes {listing(used)}"
            raise fail(key(name), value, f"is not used by method {method}", remedy)
    if getattr(choice, used[0]) is None:
        example = {"threshold": 0.2, "n": 4, "budget": 0.1}[used[0]]
        raise RecipeError(
            f"{key(used[0])}: missing; method {method} needs it, as in {used[0]}: {example}",
            key(used[0]),
        )
    for name in ("threshold", "budget"):
        value = getattr(choice, name)
        if value is not None and not 0 < value <= 1:
            raise fail(key(name), value, "is not in (0, 1]", "write a share such as 0.2")
    for name, least in (("n", 1), ("at_least", 0), ("at_most", 1), ("ep", 1)):
        value = getattr(choice, name)
        if value is not None and value < least:
            raise fail(key(name), value, "is too small", f"write {least} or more")
    if choice.at_most is not None and choice.at_most < max(choice.at_least or 0, choice.n or 0):
        name = "at_least" if (choice.at_least or 0) > choice.at_most else "n"
        raise fail(key("at_most"), choice.at_most, f"is below {name}", f"raise it or lower {name}")
    if choice.n is not None and choice.n < (choice.at_least or 0):
        raise fail(key("at_least"), choice.at_least, "is above n", "lower it or raise n")
    check_choice(key("score"), choice.score or SCORES[0], SCORES)
    check_choice(key("budget_of"), choice.budget_of or BUDGETS[0], BUDGETS)
    for j, layer in enumerate(choice.only_layers):
        if layer < 0 or layer in choice.only_layers[:j]:
            problem = "is negative" if layer < 0 else "is named twice"
            raise fail(f"{key('only_layers')}[{j}]", layer, problem, "decoder layers count from 0")


def _check_ce_share(objective: Objective, share: Weight) -> None:
    for key, value in points("objective.ce_share", share).items():
        if not 0 <= value <= 1:
            raise fail(key, value, "is not between 0 and 1", "write 0.3 for 30 % CE")
        check_bounds(key, value, MIXTURES, besides=(0, 1))
    if (objective.alpha, objective.beta) != (1.0, 0.0):
        raise fail(
            "objective.ce_share",
            share,
            "stands beside alpha or beta",
            "it sets both (beta = ce_share, alpha = 1 - ce_share): keep one form",
        )


def _check_domain_weights(recipe: Recipe, index: int, domain: Domain) -> None:
    path = f"domains[{index}]"
    check_temperature(f"{path}.temperature", domain.temperature)
    alpha, beta = recipe.alpha(domain), recipe.beta(domain)
    if ever_positive(alpha) or ever_positive(beta):
        if domain.teacher is None and domain.alpha is not None and ever_positive(domain.alpha):
            raise fail(
                f"{path}.alpha", domain.alpha, "weighs a teacher that the domain lacks",
                f"write {path}.teacher or remove alpha",
            )  # fmt: skip
        return
    if domain.teacher is None:
        raise fail(
            f"{path}.teacher",
            None,
            f"leaves domain {domain.name!r} without a loss, since its beta is 0",
            "name a teacher or set objective.beta above 0",
        )
    keys = [
        f"{'objective' if getattr(domain, name) is None else path}.{name}"
        for name in ("alpha", "beta")
    ]
    raise RecipeError(
        f"{keys[0]}: 0 and {keys[1]}: 0 leave domain {domain.name!r} without a loss; "
        "give one of them a weight above 0",
        keys[0],
    )
