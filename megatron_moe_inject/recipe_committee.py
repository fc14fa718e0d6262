"""The teachers of a domain: one, or a committee with weights; what it may be, and in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_moe_inject.recipe_numbers import WEIGHTS, check_bounds
from megatron_moe_inject.typed import RecipeError, child, fail, suggest

if TYPE_CHECKING:
    from megatron_moe_inject.recipe import Domain, Recipe

COMMITTEES = ("fixed", "label", "top")


def weights_of(teacher: str | dict[str, float] | None) -> dict[str, float]:
    """Weight of each teacher, summing to 1; empty without a teacher."""
    if not isinstance(teacher, dict):
        return {} if teacher is None else {teacher: 1.0}
    total = sum(teacher.values())
    return {name: weight / total for name, weight in teacher.items()}


def in_words(domain: Domain) -> str | None:
    """The domain's teacher, or ``0.7 coder + 0.3 prose``; ``by label(...)`` if weighed by token."""
    weights = domain.teacher_weights
    if len(weights) < 2:
        return next(iter(weights), None)
    text = " + ".join(f"{weight:.3g} {name}" for name, weight in weights.items())
    return text if domain.committee == "fixed" else f"by {domain.committee}({text})"


def check_committee(recipe: Recipe, path: str, domain: Domain) -> None:
    """Check the teachers of the domain at ``path``.

    Raises:
        RecipeError: a name that is no teacher, a weight that is not positive, weighting by token
            without teachers to weigh, or members that name different temperatures.
    """
    where = f"{path}.teacher"
    if domain.teacher == {}:
        raise fail(where, {}, "names no teacher", "write teacher: NAME, {NAME: weight}, or null")
    names = domain.teacher if isinstance(domain.teacher, dict) else domain.teacher_weights
    for name, weight in names.items():
        if name not in recipe.teachers:
            key = child(where, name) if isinstance(domain.teacher, dict) else where
            remedy = suggest(name, recipe.teachers, "teachers")
            raise fail(key, name, "is not in 'teachers'", remedy)
        if not weight > 0:
            raise fail(
                child(where, name), weight, "is not positive",
                "write the teacher's share, such as 0.3, or leave the teacher out",
            )  # fmt: skip
        check_bounds(child(where, name), weight, WEIGHTS)
    if domain.committee not in COMMITTEES:
        remedy = suggest(domain.committee, COMMITTEES, "choices")
        raise fail(f"{path}.committee", domain.committee, "is not known", remedy)
    if domain.committee != "fixed" and len(names) < 2:
        raise fail(
            f"{path}.committee", domain.committee, "weighs teachers against each other",
            f"name several, as in {where}: {{coder: 0.7, prose: 0.3}}, or write fixed",
        )  # fmt: skip
    own = {recipe.teachers[name].temperature for name in names}
    if len(own) > 1 and domain.temperature is None:
        raise RecipeError(
            f"{path}.temperature: missing; the teachers {' and '.join(names)} name different "
            "temperatures, and a committee is mixed at one: write it here",
            f"{path}.temperature",
        )
