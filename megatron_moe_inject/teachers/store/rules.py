"""What a recipe may ask of a store: of any (``check_rules``), and of one whose manifest was read
(``check_use``).

A store of ids says what a teacher found likely of some ids of each token and nothing of the rest,
so that losses which need more of a teacher are refused, before anything is built. Nothing here
needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_moe_inject.host.errors import fail, listing
from megatron_moe_inject.recipe.schema import Domain, Recipe
from megatron_moe_inject.teachers.imitation.section import IMITATION
from megatron_moe_inject.teachers.store.signing import check_package

if TYPE_CHECKING:
    from megatron_moe_inject.recipe.schema import TeacherSpec
    from megatron_moe_inject.teachers.store.manifest import StoredStates, StorePlan

KIND = "store"
SOME_IDS = (KIND, "server")
"""Kinds of teachers that have a tail."""


def taught_by(recipe: Recipe, name: str) -> list[Domain]:
    """The domains of a teacher."""
    return [domain for domain in recipe.domains if name in domain.teacher_weights]


def stored_names(recipe: Recipe) -> list[str]:
    """The recipe's teachers that are stores."""
    return [name for name, spec in recipe.teachers.items() if spec.kind == KIND]


def check_use(recipe: Recipe, name: str, plan: StorePlan) -> None:
    """Refuse what a store does not know.

    Args:
        plan: what its manifest says.

    Raises:
        RecipeError: names the setting and what the store has.
    """
    check_chunks(name, recipe.teachers[name], plan)
    if plan.states is not None:
        _check_states(recipe, name, plan.states)
    elif plan.chunks is None:
        _check_ids(recipe, name, plan)


def check_chunks(name: str, spec: TeacherSpec, plan: StorePlan) -> None:
    """Refuse a store of chunks of text where ids are asked for, and the other way round.

    Raises:
        RecipeError: names what to write.
    """
    path = f"teachers.{name}.align"
    if plan.chunks is not None and not spec.aligned:
        raise fail(
            path, spec.align,
            f"asks for ids of the student's tokenizer, and {spec.source} has chunks of text of a "
            "teacher with its own", "write align: chunks",
        )  # fmt: skip
    if plan.chunks is None and spec.aligned:
        raise fail(
            path, spec.align,
            f"compares chunks of text, and {spec.source} has ids or states of the student's tokens",
            "remove it, or write a store of a recipe whose teacher has align: chunks",
        )  # fmt: skip


def _check_states(recipe: Recipe, name: str, states: StoredStates) -> None:
    spec = recipe.teachers[name]
    if spec.tail != "bucket":
        raise fail(
            f"teachers.{name}.tail", spec.tail,
            "is for ids that are not stored, and this store has states: all are known", "remove it",
        )  # fmt: skip
    if recipe.objective.divergence == "reverse_kl" and states.excluded:
        raise fail(
            "objective.divergence", "reverse_kl",
            f"is infinite where a teacher gives no probability, and teacher {name} has no "
            f"{listing(states.excluded, 4)} of the student's ids",
            "use forward_kl, jsd or skew_kl, or a teacher with the student's tokenizer",
        )  # fmt: skip


def _check_ids(recipe: Recipe, name: str, plan: StorePlan) -> None:
    path, tail, known = f"teachers.{name}", recipe.teachers[name].tail, plan.temperatures
    if plan.drawn != (tail == "sample"):
        has = "ids that were drawn" if plan.drawn else "the most likely ones"
        raise fail(
            f"{path}.tail", tail, f"is not of this store, which has {has}",
            f"write tail: {'sample' if plan.drawn else 'bucket or renormalize'}",
        )  # fmt: skip
    for domain in taught_by(recipe, name):
        temperature = recipe.temperature(domain)
        if temperature not in known:
            raise fail(
                f"{path}.temperature", temperature,
                f"is not one of those that the store was written for ({listing(known)})",
                "distil at one of these, or write it with --temperatures",
            )  # fmt: skip
    used = {recipe.temperature(domain) for domain in taught_by(recipe, name)}
    if len(used) > 1:
        raise fail(
            f"{path}.temperature", sorted(used), "are several, and a store is read at one",
            "give its domains one temperature, or name it twice",
        )  # fmt: skip
    objective = recipe.objective
    if objective.confidence == "entropy":
        raise fail(
            "objective.confidence", "entropy",
            f"needs a teacher's whole vocabulary, and {path} is a store of some ids",
            "write label, or none, or store the teacher's states (store-teacher --states)",
        )  # fmt: skip
    if not plan.labels:
        _check_unlabelled(recipe, name)


def _check_unlabelled(recipe: Recipe, name: str) -> None:
    """Of a store that was converted from one that keeps no label's probability."""
    objective, lacks = recipe.objective, f"and teachers.{name} does not keep that"
    needs = "needs a teacher's probability of the label, "
    if objective.confidence != "none" or objective.skip_worse:
        key = "skip_worse" if objective.confidence == "none" else "confidence"
        raise fail(
            f"objective.{key}", getattr(objective, key), needs + lacks,
            "set confidence: none and skip_worse: false",
        )  # fmt: skip
    for i, domain in enumerate(recipe.domains):
        if name in domain.teacher_weights and domain.committee == "label":
            raise fail(
                f"domains[{i}].committee", "label", needs + lacks, "write committee: fixed or top"
            )


def check_rules(recipe: Recipe, name: str) -> None:
    """Refuse what no store, and no server, can do.

    Raises:
        RecipeError: the first setting that does.
    """
    spec, objective, path = recipe.teachers[name], recipe.objective, f"teachers.{name}"
    usual = type(spec)(spec.source)
    for key in ("dtype", "window", "layers", "fp8", "prefix", "ranks"):
        value = getattr(spec, key)
        if key == "prefix" and spec.aligned and spec.kind != KIND:
            continue  # of texts that are sent as the teacher's own ids
        if value != getattr(usual, key):
            raise fail(
                f"{path}.{key}", value, f"is of a model, and a {spec.kind} runs none", "remove it"
            )
    imitation = recipe[IMITATION]
    for key in imitation.in_use():
        raise fail(
            f"imitation.{key}", getattr(imitation, key),
            f"compares layers, and teacher {name} ({spec.source}) runs no model",
            "set it to 0, or name a teacher of another kind",
        )  # fmt: skip
    if spec.trusted:
        check_package(f"{path}.trusted")
    if objective.divergence != "forward_kl" and spec.tail != "bucket":
        raise fail(
            f"{path}.tail", spec.tail,
            f"knows nothing of the ids that are not stored, which {objective.divergence} needs",
            "write tail: bucket, or divergence: forward_kl",
        )  # fmt: skip
    for i, domain in enumerate(recipe.domains):
        if name in domain.teacher_weights:
            _check_committee(recipe, f"domains[{i}]", domain, name)


def _check_committee(recipe: Recipe, where: str, domain: Domain, name: str) -> None:
    """What a store says together with others."""
    tail, path = recipe.teachers[name].tail, f"teachers.{name}.tail"
    for other in domain.teacher_weights:
        spec = recipe.teachers[other]
        if spec.kind in SOME_IDS and spec.tail != tail:
            raise fail(
                path, tail, f"is not that of teacher {other} ({spec.tail}), which teaches with it",
                "write one tail for all stores and servers of a committee",
            )  # fmt: skip
        if spec.kind != KIND and tail == "sample":
            raise fail(
                path, tail, f"is of drawn ids, and {other} of {where}.teacher draws none",
                "name stores of drawn ids alone, or write another store with --top",
            )  # fmt: skip
    if tail == "sample" and domain.committee == "top":
        raise fail(
            f"{where}.committee", "top",
            f"needs a teacher's most likely id, and {name} is a store of drawn ones",
            "write fixed or label",
        )  # fmt: skip
