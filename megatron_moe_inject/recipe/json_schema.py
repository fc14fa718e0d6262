"""The recipe as a JSON Schema (draft 2020-12), so that editors complete and check recipe files.

It is made from the dataclasses: types and defaults as declared, descriptions from their docstrings'
``Attributes``, choices from its ``choices``. What a recipe may be beyond that is for
``moe-inject plan``.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

from megatron_moe_inject.recipe.expert_choice import ExpertChoice
from megatron_moe_inject.recipe.features import sections
from megatron_moe_inject.recipe.schema import Domain, Recipe
from megatron_moe_inject.recipe.section import Section

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_COMPACT = r"^\s*[0-9]+\s*:[0-9,:;\s]*$"
_TAKES_COMPACT = ((Domain, "experts"), (ExpertChoice, "layers"))
_PLAIN = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}


def recipe_schema() -> dict[str, Any]:
    """The schema of a recipe file, in plain JSON values."""
    definitions: dict[str, Any] = {}
    root = _section(Recipe, definitions)
    for key, section in sections().items():
        root["properties"][key] = _of_feature(section, definitions)
    return {"$schema": DRAFT, "title": "megatron_moe_inject recipe", **root, "$defs": definitions}


def _of_feature(section: Section[Any], definitions: dict[str, Any]) -> dict[str, Any]:
    schema = {**_type(section.kind, definitions), "description": section.about}
    default = section.default()
    return schema if dataclasses.is_dataclass(default) else {**schema, "default": default}


def attribute_texts(kind: type) -> dict[str, str]:
    """What a dataclass's docstring says of each field, on one line each."""
    text = inspect.getdoc(kind) or ""
    _, header, text = text.partition("Attributes:\n")
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in text.splitlines() if header else ():
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
        if not spec.metadata.get("written", True):
            continue
        property_schema = _type(hints[spec.name], sections)
        choices = spec.metadata.get("choices")
        if choices is not None:
            offers_null = spec.metadata.get("offers_null", True)
            null = [None] if offers_null and type(None) in get_args(hints[spec.name]) else []
            property_schema = {"enum": [*choices, *null]}
        if spec.name in texts:
            property_schema = {**property_schema, "description": texts[spec.name]}
        default = _default(spec)
        if default is dataclasses.MISSING:
            required.append(spec.name)
        elif not dataclasses.is_dataclass(default) and spec.metadata.get("offers_null", True):
            property_schema = {**property_schema, "default": default}
        if (kind, spec.name) in _TAKES_COMPACT:
            property_schema = _or_compact(property_schema)
        properties[spec.name] = property_schema
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": required} if required else schema


def _or_compact(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice of experts, or of layers with experts, may be written ``"12:3,40;13:1"``."""
    names = ("description", "default")
    annotations: dict[str, Any] = {name: choice[name] for name in names if name in choice}
    plain = {name: value for name, value in choice.items() if name not in annotations}
    return {"anyOf": [plain, {"type": "string", "pattern": _COMPACT}], **annotations}


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
    if hint is Any:
        return {}
    if origin is dict:
        schema = {"type": "object", "additionalProperties": _type(arguments[1], sections)}
        if arguments[0] is int:
            schema["propertyNames"] = {"pattern": "^[0-9]+$"}
        return schema
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if hint.__name__ not in sections:
            sections[hint.__name__] = {}  # a section may hold itself
            sections[hint.__name__] = _section(hint, sections)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    return {"type": _PLAIN[hint]}
