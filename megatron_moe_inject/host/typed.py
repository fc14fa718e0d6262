"""From YAML and dotted overrides to dataclasses, with errors that say where.

OmegaConf reads the file (YAML 1.1 with duplicate keys refused, floats such as ``1e-3``,
``${...}`` interpolation, nothing executable), applies ``key=value`` overrides in its dotlist
grammar and writes configs back. The step from plain values to dataclasses is done here by
walking the annotations rather than by merging into ``OmegaConf.structured``: that merge
loses the path of everything inside a list (``nme`` instead of ``domains[0].nme``) and converts
silently (``5`` becomes the string "5", ``3`` the boolean True). A recipe decides what a large
run trains, so a value of the wrong type is an error here.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_moe_inject.host.errors import (
    RecipeError,
    child,
    fail,
    listing,
    one_line,
    show,
    suggest,
)

_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+|\[\d+\])*")
_LARGEST = 2**63 - 1
_NOUNS = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def parse_yaml(text: str) -> dict[Any, Any]:
    """Plain nested containers from YAML text; interpolations are not resolved yet.

    Raises:
        RecipeError: invalid YAML (with line and column) or a document that is not a mapping.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise RecipeError("the file is empty; a recipe needs at least 'domains'")
        if not isinstance(root, yaml.MappingNode):
            kind = "sequence" if isinstance(root, yaml.SequenceNode) else "scalar"
            raise RecipeError(
                f"the top level is a {kind}, not a mapping; "
                "a recipe starts with keys such as 'domains:' and 'teachers:'"
            )
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {_yaml_problem(error)}") from None
    except OmegaConfBaseException as error:
        raise _from_omegaconf(error) from None
    except RecursionError:
        raise RecipeError("not a usable recipe: the YAML is nested too deeply") from None
    except RecipeError:
        raise
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        # Scalars that match a YAML 1.1 pattern but cannot be built, such as `0b_`.
        raise RecipeError(f"not valid YAML: {show(str(error))}; quote the value") from None


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = one_line(getattr(error, "problem", None) or _reason(error), 160)
    if mark is None:
        return problem
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _from_omegaconf(error: OmegaConfBaseException) -> RecipeError:
    key = getattr(error, "full_key", None) or ""
    reason = _reason(error)
    return RecipeError(f"{key}: {reason}" if key else reason, key or None)


def _reason(error: Exception) -> str:
    """The first line of an exception's message; OmegaConf appends details on further lines."""
    return one_line((str(error).splitlines() or [type(error).__name__])[0], 160)


def split_override(override: str) -> tuple[str, str]:
    """``key=value`` to its two strings; RecipeError when either the form or the key is wrong."""
    key, equals, raw = override.partition("=")
    key = key.strip()
    if not equals or not _KEY.fullmatch(key):
        raise RecipeError(
            f"--inject-set {show(override)}: not KEY=VALUE; "
            "write for example --inject-set objective.alpha=0.7 or 'domains[0].name=code'"
        )
    return key, raw


def parse_scalar(raw: str) -> Any:
    """The value of an override, read as YAML the way OmegaConf reads dotlists.

    Raises:
        RecipeError: the text is not valid YAML.
    """
    try:
        value = OmegaConf.from_dotlist([f"value={raw}"])
        return OmegaConf.to_container(value, resolve=False)["value"]
    except yaml.YAMLError as error:
        raise RecipeError(f"{show(raw)} is not valid YAML ({_yaml_problem(error)})") from None
    except (OmegaConfBaseException, RecursionError, ValueError, TypeError, AttributeError) as error:
        raise RecipeError(f"{show(raw)} cannot be read ({show(str(error))}); quote it") from None


def update(plain: dict[Any, Any], key: str, value: Any) -> dict[Any, Any]:
    """``plain`` with ``key`` (OmegaConf grammar, list indices included) replaced by ``value``.

    Raises:
        RecipeError: the key walks through an index that does not exist or through a value
            that has no keys, which OmegaConf would discard.
    """
    config = OmegaConf.create(plain)
    try:
        for dot in re.finditer(r"[.\[]", key):
            around = OmegaConf.select(config, key[: dot.start()])
            if around is not None and not OmegaConf.is_config(around):
                raise fail(
                    key[: dot.start()], around, "has no keys", f"nothing lies in it at {key}"
                )
        OmegaConf.update(config, key, value, merge=False)
    except RecipeError:
        raise
    except (OmegaConfBaseException, TypeError, IndexError, ValueError) as error:
        raise RecipeError(
            f"{key}: no such place ({_reason(error)}); overrides reach existing list entries", key
        ) from None
    return OmegaConf.to_container(config, resolve=False)


def resolve(plain: dict[Any, Any]) -> dict[Any, Any]:
    """``plain`` with ``${...}`` replaced; RecipeError naming the key that does not resolve."""
    try:
        return OmegaConf.to_container(OmegaConf.create(plain), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise _from_omegaconf(error) from None
    except RecursionError:
        raise RecipeError("interpolations refer to each other in a circle") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise RecipeError(f"cannot be resolved: {show(str(error))}") from None


def build(kind: Any, value: Any, path: str = "") -> Any:
    """A value of the annotated type ``kind`` from plain containers.

    Dataclasses, ``list``, ``dict``, unions, ``int``, ``float``, ``str`` and ``bool`` are known.
    The only conversions are int to float and digit strings to integer mapping keys. An empty
    section (``train:`` and nothing below) takes its defaults. A dataclass may say in ``NOUN`` what
    messages call it and in ``EXAMPLE`` what it looks like.

    Raises:
        RecipeError: wrong type, unknown key, missing key, or a number that is not finite.
    """
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, path)
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _build_union(kind, value, path)
    if origin is list:
        if not isinstance(value, list):
            raise fail(path, value, "is not a list", f"write {path.rpartition('.')[2]}: [...]")
        (item,) = get_args(kind)
        return [build(item, entry, f"{path}[{i}]") for i, entry in enumerate(value)]
    if origin is dict:
        return _build_dict(kind, value, path)
    return _build_leaf(kind, value, path)


def build_beside(
    kind: Any, value: dict[Any, Any], beside: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """``build`` for the top of a file, where keys stand beside those of the dataclass.

    Args:
        kind: a dataclass; fields with ``written: False`` in their metadata are no keys.
        beside: annotation of each key that is none of its fields.

    Returns:
        The dataclass, and what stands beside it, without keys that are not there or empty.
    """
    known = [f.name for f in dataclasses.fields(kind) if f.metadata.get("written", True)]
    _check_known(value, [*known, *beside], "")
    field_values = {key: entry for key, entry in value.items() if key not in beside}
    built = {
        key: build(annotation, value[key], key)
        for key, annotation in beside.items()
        if value.get(key) is not None
    }
    return build(kind, field_values), built


def _check_known(value: dict[Any, Any], known: Iterable[str], path: str) -> None:
    known = list(known)
    for key in value:
        if key not in known:
            raise RecipeError(
                f"{child(path, key)}: unknown key; {suggest(key, known, 'keys here')}",
                child(path, key),
            )


def _build_dataclass(kind: Any, value: Any, path: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if not isinstance(value, dict):
        raise fail(path, value, f"is not {_noun(kind)}", _how_to_write(kind, path))
    hints = get_type_hints(kind)
    _check_known(value, fields, path)
    built = {}
    for name, spec in fields.items():
        where = child(path, name)
        default = _default(spec)
        if name not in value:
            if default is None:
                remedy = spec.metadata.get("remedy", "it has no default")
                raise RecipeError(f"{where}: missing; {remedy}", where)
        elif value[name] is None and default and _is_section(default()):
            pass
        else:
            built[name] = build(hints[name], value[name], where)
    return kind(**built)


def _noun(kind: Any) -> str:
    return getattr(kind, "NOUN", "a mapping")


def _how_to_write(kind: Any, path: str) -> str:
    """What a mapping at ``path`` may look like, and its keys."""
    fields = dataclasses.fields(kind)
    defaults = {f.name: default() for f in fields if (default := _default(f))}
    entries = {f.name: "..." for f in fields if f.name not in defaults}
    entries = entries or dict(_first_shown(defaults))
    example = ", ".join(f"{name}: {text}" for name, text in entries.items())
    name = "" if path.endswith("]") else f"{path.rpartition('.')[2]}: "
    text = getattr(kind, "EXAMPLE", f"{{{example}}}")
    empty = f", or {name}{{}} for its defaults" if len(defaults) == len(fields) else ""
    return f"write {name}{text}{empty}; its keys are {listing(f.name for f in fields)}"


def _first_shown(defaults: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """The first default that is worth showing, as YAML has it."""
    for name, value in defaults.items():
        if isinstance(value, (bool, int, float, str)):
            return [(name, str(value).lower() if isinstance(value, bool) else f"{value}")]
    return []


def _is_section(value: Any) -> bool:
    return dataclasses.is_dataclass(value) or isinstance(value, (dict, list))


def _default(spec: dataclasses.Field) -> Callable[[], Any] | None:
    if spec.default is not dataclasses.MISSING:
        return lambda: spec.default
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory
    return None


def _build_union(kind: Any, value: Any, path: str) -> Any:
    members = get_args(kind)
    if value is None and type(None) in members:
        return None
    for member in members:
        if type(value) is member or (member is float and type(value) is int):
            return build(member, value, path)
        mapping = dataclasses.is_dataclass(member) or get_origin(member) is dict
        if mapping and isinstance(value, dict):
            return build(member, value, path)
        if get_origin(member) is list and isinstance(value, list):
            return build(member, value, path)
    names = [_NOUNS[m] for m in members if m in _NOUNS]
    sections = [m for m in members if dataclasses.is_dataclass(m)]
    names += map(_noun, sections)
    names += ["a mapping" for m in members if get_origin(m) is dict]
    names += ["a list" for m in members if get_origin(m) is list]
    if type(None) in members:
        names.append("null")
    remedy = f"it is a {type(value).__name__}"
    if sections:
        remedy = _how_to_write(sections[0], path)
    raise fail(path, value, f"is not {' or '.join(names)}", remedy)


def _build_dict(kind: Any, value: Any, path: str) -> dict:
    key_kind, item = get_args(kind)
    if not isinstance(value, dict):
        raise fail(path, value, "is not a mapping", "write 'key: value' entries below it")
    built = {}
    for raw, entry in value.items():
        key, where = raw, child(path, raw)
        if key_kind is int and isinstance(raw, str) and re.fullmatch(r"[0-9]{1,9}", raw):
            key = int(raw)
        if type(key) is not key_kind or (key_kind is int and abs(key) > _LARGEST):
            raise RecipeError(f"{where}: the key {show(raw)} is not {_NOUNS[key_kind]}", where)
        if key in built:
            raise RecipeError(f"{where}: the key {key} appears twice; keep one entry", where)
        built[key] = build(item, entry, where)
    return built


def _build_leaf(kind: Any, value: Any, path: str) -> Any:
    if kind is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise fail(path, value, "is too large", "write a finite number") from None
    if type(value) is not kind:
        extra = ""
        if kind is str and isinstance(value, (int, float)):
            extra = " (quote it to make it a string)"
        elif isinstance(value, str):
            extra = " (without quotes)"
        raise fail(path, value, f"is not {_NOUNS[kind]}", f"write {_NOUNS[kind]}{extra}")
    if kind is int and abs(value) > _LARGEST:
        raise fail(path, value, "is too large", "write a 64-bit integer")
    if kind is float and not math.isfinite(value):
        raise fail(path, value, "is not finite", "write a finite number")
    return value


def check_keys(key: str, plain: Any, known: Iterable[str], remedy: str) -> None:
    """Check that ``plain`` is a mapping with exactly these keys.

    Raises:
        RecipeError: naming ``key``, or the key that is missing or not known, and ``remedy``.
    """
    problems = []
    if not isinstance(plain, dict):
        problems.append((key, "is not a mapping"))
    else:
        problems += [(child(key, name), "is missing") for name in known if name not in plain]
        more = [name for name in plain if name not in known]
        problems += [(child(key, name), "is not known in this version") for name in more]
    if problems:
        where, problem = problems[0]
        raise RecipeError(f"{where}: {problem}; {remedy}", where)
