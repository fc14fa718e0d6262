"""All ranks of a job do the same: checked once, before anything is built.

A stale file on one node, a variable in a recipe that differs by rank (``${oc.env:RANK}``), another
profile: each rank would train something else, and nothing would say so. So every rank describes
what it is going to do, its recipe with experts and overrides resolved, what it found in profiles
and teachers' folders, its data's domains and its flags, and all descriptions must be equal.
Mistakes that only some ranks find end all of them here as well.
"""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron_moe_inject.host.errors import (
    RecipeError,
    child,
    show,
)
from megatron_moe_inject.host.meeting import Meeting
from megatron_moe_inject.host.text import (
    ranges,
)
from megatron_moe_inject.recipe.flags import name_error
from megatron_moe_inject.recipe.schema import Recipe

_READ = ("inject_recipe", "inject_set")
"""Flags whose content is in the recipe; the paths may differ."""
_WRITTEN = ("inject_profile", "inject_evaluate")
"""Flags that name what the first rank writes; whether they are given must be the same."""
_NOTHING = "nothing"


def description(recipe: Recipe, args: Namespace, made: Any) -> dict[str, str]:
    """What a rank is going to do: a value in JSON for each key of the recipe and each flag.

    Args:
        recipe: resolved as far as this run resolves it.
        args: Megatron's arguments.
        made: the run; ``describe()`` gives what it found in files.
    """
    values = dict(leaves("", recipe.plain()))
    for name, value in sorted(vars(args).items()):
        if name.startswith("inject_") and name not in _READ:
            entry = value is not None if name in _WRITTEN else value
            values["--" + name.replace("_", "-")] = _short(entry)
    for key, value in made.describe().items():
        values[key] = _short(value)
    return values


def leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every value that is no mapping and no list of mappings, with its key."""
    if isinstance(value, Mapping) and value:
        for key, entry in value.items():
            yield from leaves(child(path, str(key)), entry)
    elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        for i, entry in enumerate(value):
            yield from leaves(f"{path}[{i}]", entry)
    else:
        yield path, _short(value)


def _short(value: Any) -> str:
    """The value in JSON, its hash where that is long."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 1000 else f"sha256 {hashlib.sha256(text.encode()).hexdigest()}"


def begin_alike[Made](
    meeting: Meeting, args: Namespace, make: Callable[[], tuple[Recipe, Made]]
) -> Made:
    """What ``make`` gives, if all ranks can make it and are going to do the same.

    Args:
        meeting: all ranks.
        args: Megatron's arguments.
        make: gives the recipe, as far resolved as it gets, and the run's state.

    Traffic: that of ``Meeting.decide``, some kilobytes from each rank.

    Raises:
        RecipeError: on every rank the same: the first failing rank's mistake, or the first key in
            which ranks differ, with both values and the ranks.
    """
    recipe_and_run: tuple[Recipe, Made] | None = None
    report: dict[str, Any] = {}
    try:
        recipe_and_run = make()
        report["does"] = description(recipe_and_run[0], args, recipe_and_run[1])
    except RecipeError as error:
        named = name_error(error, args)
        report |= {"error": str(named), "key": named.key}
    try:
        wrong = meeting.decide(report, lambda said: judge(said, meeting.size))
    except RuntimeError:  # the others have gone
        if "error" not in report:
            raise
        wrong = report
    if wrong is not None:
        raise RecipeError(wrong["error"], wrong["key"])
    assert recipe_and_run is not None, "a rank that could not make its run has an error"
    return recipe_and_run[1]


def judge(said: Mapping[int, Mapping[str, Any]], size: int) -> dict[str, Any] | None:
    """What is wrong with what the ranks said, None where nothing is.

    Args:
        said: by rank, either ``does`` (``description``) or ``error`` and ``key``.
        size: how many ranks there are.
    """
    failed = sorted(rank for rank, report in said.items() if "error" in report)
    if failed:
        first = said[failed[0]]
        where = "" if len(failed) == size else f" (found on {_ranks(failed)} of {size})"
        return {"error": first["error"] + where, "key": first["key"]}
    silent = sorted(set(range(size)) - set(said))
    if silent:
        return _problem(
            f"{_ranks(silent)} of {size} did not begin an injection in time; every rank needs the "
            "same --inject-* flags"
        )
    texts = {rank: json.dumps(report["does"]) for rank, report in said.items()}
    usual = Counter(texts[rank] for rank in sorted(texts)).most_common(1)[0][0]
    other = next((rank for rank in sorted(texts) if texts[rank] != usual), None)
    if other is None:
        return None
    expected, actual = json.loads(usual), said[other]["does"]
    key = next(
        key for key in (*expected, *actual) if expected.get(key, None) != actual.get(key, None)
    )
    value = actual.get(key, _NOTHING)
    alike = [rank for rank in sorted(said) if said[rank]["does"].get(key, _NOTHING) == value]
    rest = sorted(set(said) - set(alike))
    return _problem(
        f"{key}: {show_json(value)} on {_ranks(alike)}, but "
        f"{show_json(expected.get(key, _NOTHING))} on {_ranks(rest)}; every rank needs the same "
        "recipe, profiles and flags: no stale file on a node, and no variable that differs by rank",
        key,
    )


def show_json(text: str) -> str:
    """A value of a description as errors show values."""
    try:
        return show(json.loads(text))
    except json.JSONDecodeError:  # a hash, or nothing
        return text


def _problem(error: str, key: str | None = None) -> dict[str, Any]:
    return {"error": error, "key": key}


def _ranks(ids: list[int]) -> str:
    return f"{'rank' if len(ids) == 1 else 'ranks'} {ranges(ids)}"
