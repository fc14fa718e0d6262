"""What a recipe must satisfy before anything is known about the student.

Types, unknown and missing keys are ``host.typed.build``'s business; here are the rules between
values: names that refer to each other, datasets with one owner, weights that leave no token
without a loss, and that something trains at all.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_moe_inject.host.errors import (
    RecipeError,
    child,
    fail,
    listing,
    suggest,
)
from megatron_moe_inject.host.files import is_file_path
from megatron_moe_inject.recipe.committee_rules import check_committee
from megatron_moe_inject.recipe.numbers import (
    MIXTURES,
    SHARES,
    TEMPERATURES,
    check_bounds,
    check_weight_bounds,
)
from megatron_moe_inject.recipe.retention import PLACES
from megatron_moe_inject.recipe.retention_rules import check_retention
from megatron_moe_inject.recipe.schedule import (
    SHAPES,
    Schedule,
    Weight,
    ever_positive,
    highest,
    lowest,
    value_at,
)
from megatron_moe_inject.recipe.steering import STEERING_CONFIDENCES, STOCK_BALANCES
from megatron_moe_inject.recipe.steering_rules import check_steering

if TYPE_CHECKING:
    from megatron_moe_inject.recipe.expert_choice import ExpertChoice
    from megatron_moe_inject.recipe.schema import Domain, Objective, Recipe

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl")
CONFIDENCES = ("none", "label", "entropy")
KERNELS = ("auto", "torch")
FEATURE_LOSSES = ("mse", "cosine", "normalized")
EXPERT_MODES = ("selected", "all", "none")
SCORES = ("token", "gate", "contrast")
METHODS = (*SCORES, "top_n", "budget")
BUDGETS = ("routed", "all")
TEACHER_KINDS = ("megatron", "hf")
TEACHER_DTYPES = ("params", "fp32", "bf16")
FP8_SCALINGS = ("blockwise", "tensorwise")
"""Values of ``--fp8-recipe`` whose weights need no history."""
PREFIXES = ("auto", "none", "bos")
TEACHER_FP8 = ("none", *FP8_SCALINGS)
FROZEN_EXPERTS = ("params", "fp8")
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def validate(recipe: Recipe) -> None:
    """Check everything that does not depend on the student.

    Raises:
        RecipeError: the first mistake found, in the order of the file.
    """
    if recipe.version != 1:
        raise fail("version", recipe.version, "is not known here", "this version reads version: 1")
    if not recipe.domains:
        raise fail("domains", [], "is empty", "a recipe needs at least one domain")
    _check_domains(recipe)
    _check_teachers(recipe)
    _check_objective(recipe)
    _check_train(recipe)
    steering = recipe.steering
    _check_choice("steering.stock_balance", steering.stock_balance, STOCK_BALANCES)
    _check_choice("steering.confidence", steering.confidence, STEERING_CONFIDENCES)
    for name in ("coeff", "balance", "retention"):
        _check_weight(f"steering.{name}", getattr(steering, name))
    check_steering(recipe)
    _check_mixing(recipe)
    if recipe.evaluation is not None and recipe.evaluation.file is not None:
        file = recipe.evaluation.file
        if not is_file_path(file):
            remedy = "name one, or leave it out for <save>"
            raise fail("evaluation.file", file, "is no file", remedy)


def _check_mixing(recipe: Recipe) -> None:
    known = ["general", *(domain.name for domain in recipe.domains)]
    points = {0}
    for name, share in recipe.mixing.items():
        key = f"mixing.{name}"
        if name not in known:
            raise fail(key, share, "is the share of no domain", suggest(name, known, "it may name"))
        if isinstance(share, Schedule):
            _check_weight(key, share)
            points |= set(share.points)
            if highest(share) > 1:
                raise fail(key, highest(share), "is not in [0, 1]", "write shares such as 0.1")
            if not ever_positive(share):
                raise fail(key, share, "is 0 at every iteration", "remove the data or its share")
        elif not 0 < share <= 1:
            raise fail(key, share, "is not in (0, 1]", "write a share such as 0.1")
        else:
            check_bounds(key, share, SHARES)
    for iteration in sorted(points):
        if sum(value_at(share, iteration) for share in recipe.mixing.values()) > 1 + 1e-6:
            where = "" if points == {0} else f" at iteration {iteration}"
            raise fail("mixing", recipe.mixing, f"is more than 1 in sum{where}", "lower the shares")


def _check_domains(recipe: Recipe) -> None:
    names: dict[str, str] = {"general": "the name of all other data"}
    claims: dict[int | str, str] = {}
    for i, domain in enumerate(recipe.domains):
        path = f"domains[{i}]"
        if not _NAME.fullmatch(domain.name):
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
        return
    for name, value in asdict(choice).items():
        if name not in ("layers", "origin") and value not in (None, []):
            raise fail(
                f"{path}.{name}", value, "needs a profile", f"write {path}.profile or remove it"
            )


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

    if not is_file_path(choice.profile):
        raise fail(key("profile"), choice.profile, "is no file", "name a routing profile")
    method = choice.method
    if method is None:
        raise RecipeError(f"{key('method')}: missing; choose {listing(METHODS)}", key("method"))
    _check_choice(key("method"), method, METHODS)
    own = {"top_n": ("n", "score"), "budget": ("budget", "budget_of", "score")}
    used = own.get(method, ("threshold",))
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
    _check_choice(key("score"), choice.score or SCORES[0], SCORES)
    _check_choice(key("budget_of"), choice.budget_of or BUDGETS[0], BUDGETS)
    for j, layer in enumerate(choice.only_layers):
        if layer < 0 or layer in choice.only_layers[:j]:
            problem = "is negative" if layer < 0 else "is named twice"
            raise fail(f"{key('only_layers')}[{j}]", layer, problem, "decoder layers count from 0")


def _check_teachers(recipe: Recipe) -> None:
    used = {name for domain in recipe.domains for name in domain.teacher_weights}
    for name, spec in recipe.teachers.items():
        path = f"teachers.{name}"
        if not _NAME.fullmatch(name):
            raise fail("teachers", name, "is no name", "use letters, digits, _ and -")
        if spec.kind not in TEACHER_KINDS or not spec.path.strip():
            raise fail(f"{path}.source", spec.source, "is no source", "megatron:/dir or hf:/dir")
        _check_temperature(f"{path}.temperature", spec.temperature)
        _check_choice(f"{path}.dtype", spec.dtype, TEACHER_DTYPES)
        _check_choice(f"{path}.fp8", spec.fp8, TEACHER_FP8)
        if spec.fp8 != "none" and (spec.kind != "megatron" or spec.dtype == "fp32"):
            raise fail(
                f"{path}.fp8", spec.fp8, f"is not for a teacher of {spec.kind}, {spec.dtype}",
                "FP8 is for megatron: teachers with dtype params or bf16; write none",
            )  # fmt: skip
        _check_prefix(f"{path}.prefix", spec.prefix)
        if spec.window < 0:
            raise fail(f"{path}.window", spec.window, "is negative", "0 keeps the whole step")
        for student, teacher in spec.layers.items():
            if min(student, teacher) < 0:
                raise fail(
                    f"{path}.layers.{student}", teacher, "has a negative layer",
                    "decoder layers count from 0, in the student and in the teacher",
                )  # fmt: skip
        if name not in used:
            raise fail(path, spec.source, "is used by no domain", f"write teacher: {name} in one")


def _check_prefix(path: str, prefix: str | list[int]) -> None:
    if isinstance(prefix, str):
        _check_choice(path, prefix, PREFIXES)
        return
    if not prefix:
        raise fail(path, prefix, "is empty", "write none, or list ids, such as [1]")
    for i, token in enumerate(prefix):
        if token < 0:
            raise fail(f"{path}[{i}]", token, "is negative", "ids count from 0")


def _check_temperature(path: str, value: float | None) -> None:
    if value is None:
        return
    if not value > 0:
        raise fail(path, value, "is not positive", "write a number above 0, such as 2.0")
    check_bounds(path, value, TEMPERATURES)


def _check_choice(path: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise fail(path, value, "is not known", suggest(value, choices, "choices"))


def _check_objective(recipe: Recipe) -> None:
    objective = recipe.objective
    _check_choice("objective.divergence", objective.divergence, DIVERGENCES)
    _check_choice("objective.confidence", objective.confidence, CONFIDENCES)
    _check_choice("objective.kernels", objective.kernels, KERNELS)
    _check_temperature("objective.temperature", objective.temperature)
    for name in ("jsd_beta", "skew"):
        share = getattr(objective, name)
        if not 0 < share < 1:
            remedy = "write a share strictly between; forward_kl and reverse_kl are the limits"
            raise fail(f"objective.{name}", share, "is not between 0 and 1", remedy)
        check_bounds(f"objective.{name}", share, MIXTURES)
    for name in ("alpha", "beta", "general_beta", "gamma"):
        _check_weight(f"objective.{name}", getattr(objective, name))
    for name in ("experts", "l2"):
        _check_weight(f"objective.retention.{name}", getattr(objective.retention, name))
    _check_choice("objective.retention.originals", objective.retention.originals, PLACES)
    check_retention(recipe)
    if objective.ce_share is not None:
        _check_ce_share(objective)
    _check_features(recipe)
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


def _check_features(recipe: Recipe) -> None:
    features, path = recipe.objective.features, "objective.features"
    _check_choice(f"{path}.loss", features.loss, FEATURE_LOSSES)
    for name in ("hidden", "experts"):
        _check_weight(f"{path}.{name}", getattr(features, name))
    in_use = features.in_use()
    for name, spec in recipe.teachers.items():
        if spec.layers and not in_use:
            raise fail(
                f"teachers.{name}.layers", spec.layers, "names layers that nothing imitates",
                f"set {path}.hidden or {path}.experts above 0, or remove it",
            )  # fmt: skip
        if spec.window and in_use:
            raise fail(
                f"teachers.{name}.window", spec.window, "splits the step's teacher forward",
                f"{path} sends the states of a whole step to other stages at once: write 0",
            )  # fmt: skip
    if not in_use:
        return
    weight = getattr(features, in_use[0])
    taught = [(i, domain) for i, domain in enumerate(recipe.domains) if domain.teacher]
    if not taught:
        raise fail(
            f"{path}.{in_use[0]}", weight, "weighs imitation but no domain has a teacher",
            "add domains[0].teacher or set it to 0",
        )  # fmt: skip
    if "experts" not in in_use:
        return
    for i, domain in taught:
        if not domain.experts.layers:
            raise fail(
                f"domains[{i}].experts.layers", {}, f"has no experts to imitate {domain.taught_by}",
                f"write {{layer: [expert ids]}} or set {path}.experts to 0",
            )  # fmt: skip


def _check_ce_share(objective: Objective) -> None:
    share = objective.ce_share
    if not 0 <= share <= 1:
        raise fail("objective.ce_share", share, "is not between 0 and 1", "write 0.3 for 30 % CE")
    check_bounds("objective.ce_share", share, MIXTURES, besides=(0, 1))
    if (objective.alpha, objective.beta) != (1.0, 0.0):
        raise fail(
            "objective.ce_share",
            share,
            "stands beside alpha or beta",
            "it sets both (beta = ce_share, alpha = 1 - ce_share): keep one form",
        )


def _check_domain_weights(recipe: Recipe, index: int, domain: Domain) -> None:
    path = f"domains[{index}]"
    _check_weight(f"{path}.alpha", domain.alpha)
    _check_weight(f"{path}.beta", domain.beta)
    _check_temperature(f"{path}.temperature", domain.temperature)
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


def _check_weight(path: str, weight: Weight | None) -> None:
    if isinstance(weight, Schedule):
        _check_choice(f"{path}.shape", weight.shape, SHAPES)
        if not weight.points:
            raise fail(f"{path}.points", {}, "is empty", "write iteration: value entries")
        for iteration in weight.points:
            if iteration < 0:
                raise fail(f"{path}.points", iteration, "is negative", "iterations count from 0")
    if weight is not None and lowest(weight) < 0:
        raise fail(path, lowest(weight), "is negative", "weights are 0 or more")
    check_weight_bounds(path, weight)


def _check_router_rows(recipe: Recipe) -> None:
    train = recipe.train
    if not train.router_rows:
        return
    if train.router:
        raise fail(
            "train.router_rows", True, "stands beside train.router, which trains all rows",
            "keep one of them",
        )  # fmt: skip
    for i, domain in enumerate(recipe.domains):
        if not domain.experts.layers and domain.experts.profile is None:
            raise fail(
                "train.router_rows", True, f"has no rows to train for domain {domain.name!r}",
                f"write domains[{i}].experts.layers, or train.router: true",
            )  # fmt: skip


def _check_train(recipe: Recipe) -> None:
    train = recipe.train
    _check_choice("train.experts", train.experts, EXPERT_MODES)
    _check_choice("train.frozen_experts", train.frozen_experts, FROZEN_EXPERTS)
    if train.frozen_experts == "fp8" and train.experts == "all":
        raise fail(
            "train.frozen_experts", "fp8", "keeps no expert, since all of them train",
            "write params, or train.experts: selected",
        )  # fmt: skip
    if train.fp8_source is not None and train.frozen_experts != "fp8":
        raise fail(
            "train.fp8_source", train.fp8_source, "is used only by experts kept in FP8",
            "write train.frozen_experts: fp8, or remove it",
        )  # fmt: skip
    for name in ("layers", "patterns"):
        found = getattr(train, name)
        for i, entry in enumerate(found):
            if entry in found[:i] or entry == "":
                problem = "is empty" if entry == "" else "is there twice"
                raise fail(f"train.{name}[{i}]", entry, problem, "remove it")
    _check_router_rows(recipe)
    for i, layer in enumerate(train.layers):
        if layer < 0:
            raise fail(f"train.layers[{i}]", layer, "is negative", "decoder layers count from 0")
    named = [*train.components(), *train.layers, *train.patterns]
    if train.experts == "none" and not named:
        names = [name for name, value in asdict(train).items() if value is False]
        raise fail(
            "train.experts",
            "none",
            "and nothing else leaves nothing to train",
            f"train.experts: selected, or set one of {listing(names)} to true",
        )
    for i, domain in enumerate(recipe.domains):
        chosen = domain.experts.layers or domain.experts.profile
        if train.experts == "selected" and not chosen:
            raise fail(
                f"domains[{i}].experts.layers",
                {},
                "chooses no experts while train.experts is 'selected'",
                "write {layer: [expert ids]} or profile: FILE, or set train.experts to all or none",
            )
