"""What the teachers of a domain must satisfy."""

from __future__ import annotations

from megatron_moe_inject.host.errors import RecipeError, child, fail, suggest
from megatron_moe_inject.losses.kinds import COMMITTEES
from megatron_moe_inject.recipe.numbers import WEIGHTS, check_bounds
from megatron_moe_inject.recipe.schema import Domain, Recipe


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
    temperatures = {recipe.teachers[name].temperature for name in names}
    if len(temperatures) > 1 and domain.temperature is None:
        raise RecipeError(
            f"{path}.temperature: missing; the teachers {' and '.join(names)} name different "
            "temperatures, and a committee is mixed at one: write it here",
            f"{path}.temperature",
        )
