"""Checks that follow from what a field is: a word of its choices, or a weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, get_type_hints

from megatron_moe_inject.host.errors import child, fail, suggest
from megatron_moe_inject.recipe.numbers import TEMPERATURES, check_bounds, check_weight_bounds
from megatron_moe_inject.recipe.schedule import SHAPES, Schedule, Weight, lowest

_WEIGHTS = (Weight, Weight | None)


def check_fields(path: str, value: Any) -> None:
    """Check words and weights of a section and of all within.

    A field with ``choices`` in its metadata is one of these words, or ``None`` where it may be; one
    annotated ``float | Schedule`` is a weight.

    Args:
        path: its key.
        value: a dataclass, or lists and mappings of some; anything else has nothing to check.

    Raises:
        RecipeError: the first mistake.
    """
    if isinstance(value, list):
        for i, entry in enumerate(value):
            check_fields(f"{path}[{i}]", entry)
    elif isinstance(value, dict):
        for key, entry in value.items():
            check_fields(child(path, str(key)), entry)
    elif dataclasses.is_dataclass(value):
        hints = get_type_hints(type(value))
        for field in dataclasses.fields(value):
            where, item = child(path, field.name), getattr(value, field.name)
            if "choices" in field.metadata:
                if item is not None:
                    check_choice(where, item, field.metadata["choices"])
            elif hints[field.name] in _WEIGHTS:
                check_weight(where, item)
            else:
                check_fields(where, item)


def weights_in(path: str, section: Any) -> dict[str, Weight]:
    """The weights that a dataclass has, by their keys."""
    if not dataclasses.is_dataclass(section):
        return {}
    hints = get_type_hints(type(section))
    weights = {
        child(path, field.name): getattr(section, field.name)
        for field in dataclasses.fields(section)
        if hints[field.name] in _WEIGHTS
    }
    return {key: weight for key, weight in weights.items() if weight is not None}


def check_choice(path: str, value: str, choices: Sequence[str]) -> None:
    """Raises ``RecipeError`` where a word is not one of ``choices``."""
    if value not in choices:
        raise fail(path, value, "is not known", suggest(value, choices, "choices"))


def check_weight(path: str, weight: Weight | None) -> None:
    """Check a weight, a share that changes, or their absence.

    Raises:
        RecipeError: negative, not a number of float32, or a schedule without points.
    """
    if isinstance(weight, Schedule):
        check_choice(f"{path}.shape", weight.shape, SHAPES)
        if not weight.points:
            raise fail(f"{path}.points", {}, "is empty", "write iteration: value entries")
        for iteration in weight.points:
            if iteration < 0:
                raise fail(f"{path}.points", iteration, "is negative", "iterations count from 0")
    if weight is not None and lowest(weight) < 0:
        raise fail(path, lowest(weight), "is negative", "weights are 0 or more")
    check_weight_bounds(path, weight)


def check_temperature(path: str, value: float | None) -> None:
    """Raises ``RecipeError`` unless a temperature is positive, within bounds, or not there."""
    if value is None:
        return
    if not value > 0:
        raise fail(path, value, "is not positive", "write a number above 0, such as 2.0")
    check_bounds(path, value, TEMPERATURES)
