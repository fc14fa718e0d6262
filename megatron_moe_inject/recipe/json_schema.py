"""The recipe as a JSON Schema (draft 2020-12), so that editors complete and check recipe files.

It is made from the dataclasses: types and defaults as declared, descriptions from their docstrings'
``Attributes``, choices from the words that the rules know. What a recipe may be beyond that is for
``moe-inject plan``.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

from megatron_moe_inject.recipe import rules
from megatron_moe_inject.recipe.committee import COMMITTEES
from megatron_moe_inject.recipe.retention import PLACES
from megatron_moe_inject.recipe.schedule import SHAPES
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.recipe.steering import STEERING_CONFIDENCES, STOCK_BALANCES

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_CHOICES = {
    ("Domain", "committee"): COMMITTEES,
    ("ExpertChoice", "method"): rules.METHODS,
    ("ExpertChoice", "score"): rules.SCORES,
    ("ExpertChoice", "budget_of"): rules.BUDGETS,
    ("Features", "loss"): rules.FEATURE_LOSSES,
    ("Objective", "confidence"): rules.CONFIDENCES,
    ("Objective", "divergence"): rules.DIVERGENCES,
    ("Objective", "kernels"): rules.KERNELS,
    ("Retention", "originals"): PLACES,
    ("Schedule", "shape"): SHAPES,
    ("Steering", "confidence"): STEERING_CONFIDENCES,
    ("Steering", "stock_balance"): STOCK_BALANCES,
    ("TeacherSpec", "dtype"): rules.TEACHER_DTYPES,
    ("TeacherSpec", "fp8"): rules.TEACHER_FP8,
    ("Train", "experts"): rules.EXPERT_MODES,
    ("Train", "frozen_experts"): rules.FROZEN_EXPERTS,
}
_COMPACT = r"^\s*[0-9]+\s*:[0-9,:;\s]*$"
_PLAIN = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}


def recipe_schema() -> dict[str, Any]:
    """The schema of a recipe file, in plain JSON values."""
    sections: dict[str, Any] = {}
    root = _section(Recipe, sections)
    return {"$schema": DRAFT, "title": "megatron_moe_inject recipe", **root, "$defs": sections}


def attribute_texts(kind: type) -> dict[str, str]:
    """What a dataclass's docstring says of each field, on one line each."""
    text = inspect.getdoc(kind) or ""
    _, found, text = text.partition("Attributes:\n")
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in text.splitlines() if found else ():
        if line.strip() and not line.startswith(" "):
            break
        if match := re.match(r"    (\w+(?:, \w+)*): (.*)", line):
            names = match[1].split(", ")
            texts |= dict.fromkeys(names, match[2])
        else:
            texts |= {name: f"{texts[name]} {line.strip()}".strip() for name in names}
    return texts


def _section(kind: type, sections: dict[str, Any]) -> dict[str, Any]:
    """A dataclass as an object."""
    texts, hints = attribute_texts(kind), get_type_hints(kind)
    properties, required = {}, []
    for spec in dataclasses.fields(kind):
        found = _type(hints[spec.name], sections)
        choices = _CHOICES.get((kind.__name__, spec.name))
        if choices is not None:
            null = [None] if type(None) in get_args(hints[spec.name]) else []
            found = {"enum": [*choices, *null]}
        if spec.name in texts:
            found = {**found, "description": texts[spec.name]}
        default = _default(spec)
        if default is dataclasses.MISSING:
            required.append(spec.name)
        elif not dataclasses.is_dataclass(default):
            found = {**found, "default": default}
        properties[spec.name] = found
    if kind.__name__ == "ExpertChoice":
        properties["layers"] = _or_compact(properties["layers"])
    shown = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**shown, "required": required} if required else shown


def _or_compact(layers: dict[str, Any]) -> dict[str, Any]:
    """A choice of layers may be written ``"12:3,40;13:1"``."""
    kept = {name: layers.pop(name) for name in ("description", "default")}
    return {"anyOf": [layers, {"type": "string", "pattern": _COMPACT}], **kept}


def _default(spec: dataclasses.Field) -> Any:
    if spec.default is not dataclasses.MISSING:
        return spec.default
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return dataclasses.MISSING


def _type(hint: Any, sections: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_type(argument, sections) for argument in arguments]}
    if origin is list:
        return {"type": "array", "items": _type(arguments[0], sections)}
    if origin is dict:
        found = {"type": "object", "additionalProperties": _type(arguments[1], sections)}
        if arguments[0] is int:
            found["propertyNames"] = {"pattern": "^[0-9]+$"}
        return found
    if dataclasses.is_dataclass(hint):
        if hint.__name__ not in sections:
            sections[hint.__name__] = {}  # a section may hold itself
            sections[hint.__name__] = _section(hint, sections)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    return {"type": _PLAIN[hint]}
