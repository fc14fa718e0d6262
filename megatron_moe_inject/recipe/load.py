"""Recipes from files, flags and text: read, overridden and checked."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from omegaconf import OmegaConf

from megatron_moe_inject.host import typed
from megatron_moe_inject.host.errors import RecipeError, fail, show_path, suggest
from megatron_moe_inject.recipe.expert_choice import parse_experts
from megatron_moe_inject.recipe.features import sections
from megatron_moe_inject.recipe.old_words import current, rename
from megatron_moe_inject.recipe.rules import validate
from megatron_moe_inject.recipe.schema import Recipe


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override and check a recipe file.

    Args:
        path: a YAML file.
        overrides: ``key=value`` strings in OmegaConf's dotlist grammar, applied in order. A
            value replaces what was there (``teachers.coder.temperature=2``,
            ``domains[0].experts.layers.3=[0,5]``); list indices must exist.

    Raises:
        RecipeError: any mistake; the message begins with the file, or with the override that
            set the offending key.
    """
    overrides = list(overrides)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RecipeError(
            f"--inject-recipe {show_path(path)} cannot be read ({reason}); give a YAML file"
        ) from None
    try:
        return recipe_from_yaml(text, overrides)
    except RecipeError as error:
        raise located(error, path, overrides) from None


def located(error: RecipeError, path: str | Path | None, overrides: Iterable[str]) -> RecipeError:
    """The same error, beginning with the override or else the file that set its key.

    Errors that already begin with a flag or with the file stay as they are.
    """
    if str(error).startswith(("--", f"{path}: ")):
        return error
    culprit = next((o for o in reversed(list(overrides)) if _sets(o, error.key)), None)
    where = f"--inject-set {typed.one_line(culprit)}" if culprit else path
    return error if where is None else RecipeError(f"{where}: {error}", error.key)


def _sets(override: str, key: str | None) -> bool:
    """Whether the override wrote ``key`` or something around it."""
    if not key:
        return False
    ours = _path_parts(current(override.partition("=")[0].strip()))
    theirs = _path_parts(key)
    return theirs[: len(ours)] == ours


def _path_parts(key: str) -> list[str]:
    return [part for part in re.split(r"[.\[\]]+", key.strip()) if part]


def recipe_from_yaml(text: str, overrides: Iterable[str] = ()) -> Recipe:
    """``load_recipe`` for text that is already in memory; errors do not name a file."""
    return _finish(_expand_experts(typed.parse_yaml(text)), overrides)


def _finish(plain: dict, overrides: Iterable[str]) -> Recipe:
    plain, remarks = rename(plain)
    for override in overrides:
        key, raw = typed.split_override(override)
        if current(key) != key:
            remarks.append(f"--inject-set {key}: is called {current(key)} now")
        plain = _apply(plain, current(key), raw, override)
    plain = _expand_experts(typed.resolve(plain))
    known = sections()
    kinds = {key: section.kind for key, section in known.items()}
    recipe, written = typed.build_beside(Recipe, plain, kinds)
    for key, section in known.items():
        if key in written and written[key] != section.default():
            recipe.sections[key] = written[key]
    recipe.remarks = remarks
    validate(recipe)
    return recipe


def _apply(plain: dict, key: str, raw: str, override: str) -> dict:
    parts = _path_parts(key)
    teachers = plain.get("teachers")
    try:
        if parts[0] == "teachers" and len(parts) == 3 and parts[2] != "source":
            known = teachers if isinstance(teachers, dict) else {}
            if parts[1] not in known:
                remedy = suggest(parts[1], known, "teachers")
                raise RecipeError(f"{key}: no teacher {parts[1]!r}; {remedy}", key)
        compact = re.match(r"\s*[0-9]+\s*:", raw)  # YAML would read 12:3 as 12 * 60 + 3
        if parts[-1] == "layers" and compact:
            value: Any = parse_experts(raw, key)
        elif parts[0] == "domains" and parts[2:] == ["experts"] and compact:
            value = {"layers": parse_experts(raw, key)}
        else:
            value = typed.parse_scalar(raw)
        return _expand_experts(typed.update(plain, key, value), later_wins=True)
    except RecipeError as error:
        where = f"--inject-set {typed.one_line(override)}"
        raise RecipeError(f"{where}: {error}", error.key or key) from None


def _expand_experts(plain: dict, later_wins: bool = False) -> dict:
    """Compact expert strings become mappings; with ``later_wins`` keys 3 and "3" are unified."""
    domains = plain.get("domains")
    for i, domain in enumerate(domains if isinstance(domains, list) else []):
        experts = domain.get("experts") if isinstance(domain, dict) else None
        path = f"domains[{i}].experts"
        if _is_compact(experts, path):
            domain["experts"] = {"layers": parse_experts(experts, path)}
        if not isinstance(experts, dict):
            continue
        layers = experts.get("layers")
        if _is_compact(layers, f"{path}.layers"):
            experts["layers"] = parse_experts(layers, f"{path}.layers")
        elif isinstance(layers, dict) and later_wins:
            experts["layers"] = {
                int(k) if isinstance(k, str) and re.fullmatch("[0-9]{1,9}", k) else k: v
                for k, v in layers.items()
            }
    return plain


def _is_compact(value: Any, key: str) -> TypeGuard[str]:
    """Whether a value is experts in compact form, whatever is wrong in it."""
    if type(value) is int:  # YAML 1.1 reads 12:3 as 12 * 60 + 3
        raise fail(key, value, "is not a mapping", 'quote the compact form, as in "12:3"')
    return isinstance(value, str) and "${" not in value


def dump_recipe(recipe: Recipe) -> str:
    """YAML that ``load_recipe`` reads back to an equal recipe; every field is written."""
    whole = {key: recipe[section] for key, section in sections().items()}
    return OmegaConf.to_yaml(OmegaConf.create(replace(recipe, sections=whole).plain()))


def recipe_from_flags(
    *,
    data: list[int | str],
    experts: str | None = None,
    teacher: str | None = None,
    name: str = "domain",
    router: bool = False,
    everything: bool = False,
    overrides: Iterable[str] = (),
    **objective: Any,
) -> Recipe:
    """The recipe of the plain flags: one domain, at most one teacher.

    Args:
        data: blend entries of the domain.
        experts: compact form ``"12:3,40;13:1"``; None trains no experts (router only).
        teacher: ``megatron:/dir`` or ``hf:/dir``; None = cross-entropy only.
        everything: the whole student trains.
        overrides: as for ``load_recipe``.
        objective: fields of ``Objective``; absent ones take its defaults.

    Raises:
        RecipeError: any mistake, named by the recipe's keys.
    """
    plain = {
        "domains": [
            {
                "name": name,
                "data": data,
                "teacher": None if teacher is None else "teacher",
                "experts": {
                    "layers": parse_experts(experts, "domains[0].experts.layers")
                    if experts is not None
                    else {}
                },
            }
        ],
        "teachers": {} if teacher is None else {"teacher": {"source": teacher}},
        "objective": objective,
        "train": {
            "experts": "none" if experts is None and not everything else "selected",
            "everything": everything,
            "router": router,
        },
    }
    return _finish(plain, overrides)
