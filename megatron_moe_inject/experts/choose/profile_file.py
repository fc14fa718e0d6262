"""Routing profiles as files, and their sum.

One JSON file: format, version, provenance, statistics by class, and a SHA-256 over the canonical
form of all that (sorted keys, shortest numbers), so that layout does not matter and every value
does. Rows of numbers stand one to a line. Co-selections, by far the largest part, are the
rows right of the diagonal; for 61 layers of 256 experts they take about 10 MB a class, everything
else about 2 MB. Samples of router logits are tensors in a file of their own
(``router_logits.py``), of which the profile holds name and checksum.

Merging adds counts. It refuses profiles of different students, and profiles that share a part,
which would count the same tokens twice. Sampled logits stay with the recorded profiles.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moe_inject.experts.choose.routing_profile import (
    ClassStatistics,
    LogitFile,
    Provenance,
    RoutingProfile,
    Spread,
    check_profile,
    check_provenance,
)
from megatron_moe_inject.host import typed
from megatron_moe_inject.host.errors import (
    RecipeError,
    listing,
    show,
)
from megatron_moe_inject.host.files import readable_json, replace_file

FORMAT = "megatron_moe_inject.routing_profile"
VERSION = 1

_AGAIN = "record the profile again, or restore the file from a copy"
_LARGEST = 2**53
"""Integers up to here are exact as floats, and their sums over experts fit into 64 bits."""
_KEYS = ("format", "version", "sha256", "parts", "provenance", "classes")
_CLASS_KEYS = tuple(field.name for field in fields(ClassStatistics))
_SPREAD_KEYS = tuple(field.name for field in fields(Spread))


def write_profile(path: str | Path, profile: RoutingProfile) -> str:
    """Replace ``path`` by the profile, whole or not at all; returns its checksum.

    Raises:
        RecipeError: the profile contradicts itself, or the file cannot be written.
    """
    check_profile(profile)
    content = _content(profile)
    checksum = _checksum(content)
    head = {"format": FORMAT, "version": VERSION, "sha256": checksum}
    replace_file(path, (readable_json({**head, **content}) + "\n").encode())
    return checksum


def read_profile(path: str | Path) -> RoutingProfile:
    """Read and check a profile.

    Raises:
        RecipeError: the file cannot be read, is no profile, is of another version, is damaged,
            or contradicts itself. The message begins with the file.
    """
    try:
        return _parse(_load(path))
    except RecipeError as error:
        raise RecipeError(f"{typed.one_line(str(path), 200)}: {error}", error.key) from None


def profile_checksum(profile: RoutingProfile) -> str:
    """SHA-256 in hexadecimal, as ``write_profile`` stores it."""
    return _checksum(_content(profile))


def merge_profiles(profiles: Mapping[str, RoutingProfile]) -> RoutingProfile:
    """The sum of profiles of one student; a class in several of them is added up.

    Args:
        profiles: by the name that messages use, such as their files.

    Raises:
        RecipeError: different students or settings, a part that two profiles share, or a class
            of which only some profiles have the spread or the co-selections.
    """
    assert profiles
    (first, base), *others = profiles.items()
    provenance = base.provenance
    for name, profile in others:
        _check_same_student(first, provenance, name, profile.provenance)
    owners: dict[str, str] = {}
    for name, profile in profiles.items():
        for part in _parts(profile):
            if part in owners:
                raise RecipeError(
                    f"{name}: shares recorded tokens with {owners[part]} (sha256 {part[:12]}); "
                    "merge every recording once"
                )
            owners[part] = name
    versions = {
        v for p in profiles.values() for v in p.provenance.megatron_version.split(", ") if v
    }
    classes: dict[str, ClassStatistics] = {}
    sources: dict[str, str] = {}
    for name, profile in profiles.items():
        for key, statistics in profile.classes.items():
            if key in classes:
                statistics = _add(key, sources[key], classes[key], name, statistics)
            classes[key] = statistics
            sources.setdefault(key, name)
    merged = replace(provenance, megatron_version=", ".join(sorted(versions)))
    return RoutingProfile(merged, classes, tuple(sorted(owners)))


def _parts(profile: RoutingProfile) -> tuple[str, ...]:
    return profile.parts or (profile_checksum(profile),)


def _check_same_student(first: str, a: Provenance, name: str, b: Provenance) -> None:
    ours, theirs = _flat(asdict(a)), _flat(asdict(b))
    apart = {"megatron_version", "checkpoint_iteration", "checkpoint_sha256"}
    if a.checkpoint_sha256 and b.checkpoint_sha256:  # the same one may lie in two places
        apart = {"megatron_version", "checkpoint"}
    for key, value in theirs.items():
        if value != ours[key] and key not in apart:
            raise RecipeError(
                f"{name}: {key} is {show(value)}, but {show(ours[key])} in {first}; "
                "merge profiles of one student recorded with the same settings"
            )


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _add(
    key: str, first: str, a: ClassStatistics, name: str, b: ClassStatistics
) -> ClassStatistics:
    for optional in ("spread", "coselections"):
        having = [owner for owner, s in ((first, a), (name, b)) if getattr(s, optional) is not None]
        if len(having) == 1:
            raise RecipeError(
                f"{name}: class {key} has {optional} in {having[0]} only; "
                "record both alike, or merge files of different classes"
            )

    def total(x: Any, y: Any) -> Any:
        return None if x is None else x + y

    return ClassStatistics(
        data=tuple(dict.fromkeys(a.data + b.data)),
        **{
            field: total(getattr(a, field), getattr(b, field))
            for field in _CLASS_KEYS
            if field not in ("data", "spread")
        },
        spread=None
        if a.spread is None
        else Spread(*(getattr(a.spread, f) + getattr(b.spread, f) for f in _SPREAD_KEYS)),
    )


def _content(profile: RoutingProfile) -> dict[str, Any]:
    """Everything the checksum covers, in plain values."""
    content = {
        "parts": list(profile.parts),
        "provenance": _plain_provenance(profile.provenance),
        "classes": {name: _plain_class(statistics) for name, statistics in profile.classes.items()},
    }
    return content if profile.logits is None else content | {"logits": asdict(profile.logits)}


def _plain_provenance(provenance: Provenance) -> dict[str, Any]:
    """Without what files of earlier versions did not have, whose checksums stay theirs."""
    later = ("checkpoint_iteration", "checkpoint_sha256", "hybrid_layer_pattern", "new_experts")
    fields = asdict(provenance)
    if provenance.new_experts is not None:
        fields["new_experts"] = {str(la): ids for la, ids in provenance.new_experts.items()}
    return {name: value for name, value in fields.items() if value is not None or name not in later}


def _plain_class(found: ClassStatistics) -> dict[str, Any]:
    spread, pairs = found.spread, found.coselections
    return {
        "data": list(found.data),
        "tokens": found.tokens.tolist(),
        "selections": found.selections.tolist(),
        "gate_sums": found.gate_sums.tolist(),
        "prob_sums": found.prob_sums.tolist(),
        "spread": spread
        and {
            "sequences": spread.sequences,
            "share_sums": spread.share_sums.tolist(),
            "share_squares": spread.share_squares.tolist(),
        },
        "dropped": None if found.dropped is None else found.dropped.tolist(),
        "coselections": None
        if pairs is None
        else [[row[i + 1 :].tolist() for i, row in enumerate(layer[:-1])] for layer in pairs],
    }


def _checksum(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _load(path: str | Path) -> Any:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RecipeError(
            f"cannot be read ({reason}); give a routing profile, relative to {Path.cwd()}"
        ) from None
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise RecipeError(f"is nested too deeply for a profile; {_AGAIN}") from None
    except RecipeError:
        raise
    except ValueError as error:
        reason = typed.one_line(str(error))
        raise RecipeError(f"is damaged or no JSON ({reason}); {_AGAIN}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) != len(pairs):
        raise RecipeError(f"has a key twice among {listing(k for k, _ in pairs)}; {_AGAIN}")
    return built


def _no_constant(name: str) -> float:
    raise RecipeError(f"has the number {name}, which no count is; {_AGAIN}")


def _parse(plain: Any) -> RoutingProfile:
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise RecipeError(f"is not a routing profile (its format is not {FORMAT!r})")
    if type(plain.get("version")) is not int or plain["version"] != VERSION:
        raise RecipeError(
            f"version: {show(plain.get('version'))} is not known here; this package reads version "
            f"{VERSION}: record the profile again, or use the package that wrote it",
            "version",
        )
    sampled = "logits" in plain
    typed.check_keys("", plain, (*_KEYS, "logits") if sampled else _KEYS, _AGAIN)
    provenance = typed.build(Provenance, plain["provenance"], "provenance")
    check_provenance(provenance)
    parts = typed.build(list[str], plain["parts"], "parts")
    classes = plain["classes"]
    if not isinstance(classes, dict):
        raise _wrong("classes", "is not a mapping")
    profile = RoutingProfile(
        provenance,
        {
            name: _class(f"classes.{name}", content, *provenance.shape)
            for name, content in classes.items()
        },
        tuple(parts),
        typed.build(LogitFile, plain["logits"], "logits") if sampled else None,
    )
    if plain["sha256"] != profile_checksum(profile):
        raise RecipeError(f"sha256: does not fit the content, which was changed; {_AGAIN}")
    check_profile(profile)
    return profile


def _class(key: str, plain: Any, layers: int, experts: int) -> ClassStatistics:
    typed.check_keys(key, plain, _CLASS_KEYS, _AGAIN)

    def matrix(name: str, kind: type, owner: dict = plain, where: str = key) -> np.ndarray:
        return _array(f"{where}.{name}", owner[name], (layers, experts), kind)

    def optional(name: str, build: Callable[[], Any]) -> Any:
        return None if plain[name] is None else build()

    def spread() -> Spread:
        where, content = f"{key}.spread", plain["spread"]
        typed.check_keys(where, content, _SPREAD_KEYS, _AGAIN)
        return Spread(
            typed.build(int, content["sequences"], f"{where}.sequences"),
            matrix("share_sums", float, content, where),
            matrix("share_squares", float, content, where),
        )

    return ClassStatistics(
        data=tuple(typed.build(list[str], plain["data"], f"{key}.data")),
        tokens=_array(f"{key}.tokens", plain["tokens"], (layers,), int),
        selections=matrix("selections", int),
        gate_sums=matrix("gate_sums", float),
        prob_sums=matrix("prob_sums", float),
        spread=optional("spread", spread),
        dropped=optional("dropped", lambda: matrix("dropped", int)),
        coselections=optional(
            "coselections",
            lambda: _pairs(f"{key}.coselections", plain["coselections"], layers, experts),
        ),
    )


def _pairs(key: str, plain: Any, layers: int, experts: int) -> np.ndarray:
    """``[L, E, E]`` from the rows right of the diagonal."""
    _check_length(key, plain, layers)
    pairs = np.zeros((layers, experts, experts), dtype=np.int64)
    for layer, rows in enumerate(plain):
        _check_length(f"{key}[{layer}]", rows, experts - 1)
        for i, row in enumerate(rows):
            pairs[layer, i, i + 1 :] = _array(f"{key}[{layer}][{i}]", row, (experts - 1 - i,), int)
    return pairs + pairs.transpose(0, 2, 1)


def _array(key: str, plain: Any, shape: tuple[int, ...], kind: type) -> np.ndarray:
    """An int64 or float64 array from nested lists of exactly that shape and type."""
    _check_length(key, plain, shape[0])
    if len(shape) > 1:
        rows = [_array(f"{key}[{i}]", row, shape[1:], kind) for i, row in enumerate(plain)]
        return np.stack(rows)
    allowed = {int} if kind is int else {int, float}
    if not set(map(type, plain)) <= allowed:
        wrong = next(value for value in plain if type(value) not in allowed)
        noun = "an integer" if kind is int else "a number"
        raise _wrong(key, f"has {show(wrong)} in the place of {noun}")
    if plain and max(map(abs, plain)) > _LARGEST:
        raise _wrong(key, "has a number beyond 2**53")
    return np.array(plain, dtype=np.int64 if kind is int else np.float64)


def _check_length(key: str, plain: Any, length: int) -> None:
    if not isinstance(plain, list):
        raise _wrong(key, "is not a list")
    if len(plain) != length:
        raise _wrong(key, f"has {len(plain)} entries where the provenance says {length}")


def _wrong(key: str, problem: str) -> RecipeError:
    return RecipeError(f"{key}: {problem}; {_AGAIN}", key)
