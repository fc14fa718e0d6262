"""What a recipe may ask of a store, without reading it: which ids it does not know is nowhere.

A store says what a teacher found likely of some ids of each token and nothing of the rest, so that
losses which need more of a teacher are refused, before anything is built. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_moe_inject.host.errors import fail, listing
from megatron_moe_inject.recipe.schema import Domain, Recipe
from megatron_moe_inject.teachers.imitation.section import IMITATION
from megatron_moe_inject.teachers.store.signing import check_package

KIND = "store"


def taught_by(recipe: Recipe, name: str) -> list[Domain]:
    """The domains of a teacher."""
    return [domain for domain in recipe.domains if name in domain.teacher_weights]


def stored_names(recipe: Recipe) -> list[str]:
    """The recipe's teachers that are stores."""
    return [name for name, spec in recipe.teachers.items() if spec.kind == KIND]


def check_use(recipe: Recipe, name: str, known: Sequence[float]) -> None:
    """Refuse temperatures that a store does not know.

    Args:
        known: those that it was written for.

    Raises:
        RecipeError: names the domain and what the store has.
    """
    for domain in taught_by(recipe, name):
        temperature = recipe.temperature(domain)
        if temperature not in known:
            raise fail(
                f"teachers.{name}.temperature", temperature,
                f"is not one of those that the store was written for ({listing(known)})",
                "distil at one of these, or write it with --temperatures",
            )  # fmt: skip
    if recipe.teachers[name].tail == "sample":
        raise fail(
            f"teachers.{name}.tail", "sample",
            "is of ids that were drawn, and this store has the most likely ones",
            "write bucket or renormalize",
        )  # fmt: skip
    used = {recipe.temperature(domain) for domain in taught_by(recipe, name)}
    if len(used) > 1:
        raise fail(
            f"teachers.{name}.temperature", sorted(used), "are several, and a store is read at one",
            "give its domains one temperature, or name it twice",
        )  # fmt: skip


def check_rules(recipe: Recipe, name: str) -> None:
    """Refuse what needs more of a teacher than some ids of each token.

    Raises:
        RecipeError: the first setting that does.
    """
    spec, objective, path = recipe.teachers[name], recipe.objective, f"teachers.{name}"
    usual = type(spec)(spec.source)
    for key in ("dtype", "window", "layers", "fp8", "prefix", "ranks"):
        value = getattr(spec, key)
        if value != getattr(usual, key):
            raise fail(f"{path}.{key}", value, "is of a model, and a store runs none", "remove it")
    imitation = recipe[IMITATION]
    for key in imitation.in_use():
        raise fail(
            f"imitation.{key}", getattr(imitation, key),
            f"compares layers, and teacher {name} ({spec.source}) runs no model",
            "set it to 0, or name a teacher of another kind",
        )  # fmt: skip
    if spec.trusted:
        check_package(f"{path}.trusted")
    if objective.confidence != "none" or objective.skip_worse:
        key = "skip_worse" if objective.confidence == "none" else "confidence"
        raise fail(
            f"objective.{key}", getattr(objective, key),
            f"needs a teacher's whole vocabulary, and {path} is a store of some ids",
            "set confidence: none and skip_worse: false",
        )  # fmt: skip
    if objective.divergence != "forward_kl" and spec.tail != "bucket":
        raise fail(
            f"{path}.tail", spec.tail,
            f"knows nothing of the ids that are not stored, which {objective.divergence} needs",
            "write tail: bucket, or divergence: forward_kl",
        )  # fmt: skip
    for i, domain in enumerate(recipe.domains):
        if name in domain.teacher_weights and len(domain.teacher_weights) > 1:
            raise fail(
                f"domains[{i}].teacher", listing(domain.teacher_weights),
                f"mixes whole distributions, and {name} is a store of some ids",
                "name the store alone",
            )  # fmt: skip
