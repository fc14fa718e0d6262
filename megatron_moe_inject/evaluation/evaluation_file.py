"""Evaluations as files: one JSON document, or one line of a run's growing list.

Both hold the same: format, version, a SHA-256 over the canonical form of the content (sorted keys,
shortest numbers), provenance, and for each class a summary to read and the sums of its sequences to
compare by. The summary follows from the sums, and is checked against them.

A document is replaced whole or not at all. A run's list (``inject_evaluation.jsonl``) grows by one
write per line, so that a reader of a running run sees whole lines and perhaps the beginning of
another, which has no line end and is left out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_moe_inject.evaluation.evaluation import (
    ALWAYS,
    BINS,
    COUNTS,
    LARGEST,
    SUMS,
    ClassEvaluation,
    Evaluation,
    Provenance,
)
from megatron_moe_inject.host import files, typed
from megatron_moe_inject.host.errors import (
    RecipeError,
    show,
)
from megatron_moe_inject.host.files import readable_json, replace_file

if TYPE_CHECKING:
    from megatron_moe_inject.preference.measured_pairs import MeasuredPairs

FORMAT = "megatron_moe_inject.evaluation"
VERSION = 1
LIST = "inject_evaluation.jsonl"
"""Name of a run's list of evaluations in ``<save>``."""
_AGAIN = "measure again, or restore the file from a copy"
_KEYS = ("format", "version", "sha256", "provenance", "text", "classes")
_PAIRS = "pairs"
_PAIRS_KEYS = ("data", "reference", "loss", "summary", "pairs", "sums")
_CLASS_KEYS = ("data", "teacher", "summary", "calibration", "sequences", "sums")


def write_evaluation(path: str | Path, evaluation: Evaluation) -> str:
    """Replace ``path`` by the evaluation, whole or not at all; returns its checksum.

    Raises:
        RecipeError: the file cannot be written.
    """
    plain = _plain(evaluation)
    replace_file(path, (readable_json(plain) + "\n").encode())
    return plain["sha256"]


def read_evaluation(path: str | Path, *, last: bool = True) -> Evaluation:
    """Read and check an evaluation; of a run's list, the last line or the first.

    Raises:
        RecipeError: the file cannot be read, is no evaluation, is of another version or damaged.
            The message begins with the file.
    """
    if Path(path).suffix == ".jsonl":
        evaluations = read_list(path)
        if not evaluations:
            raise RecipeError(f"{typed.one_line(str(path), 200)}: has no evaluation yet")
        return evaluations[-1 if last else 0]
    try:
        return _parse(_text(path))
    except RecipeError as error:
        raise RecipeError(f"{typed.one_line(str(path), 200)}: {error}", error.key) from None


def read_list(path: str | Path) -> list[Evaluation]:
    """The evaluations of a run so far, by rising iteration; empty where there is no file.

    Raises:
        RecipeError: a line is damaged. The message begins with file and line.
    """
    if not Path(path).exists():
        return []
    evaluations, where = [], typed.one_line(str(path), 200)
    try:
        for number, line in enumerate(files.whole_lines(_text(path)), start=1):
            where = f"{typed.one_line(str(path), 200)}, line {number}"
            evaluations.append(_parse(line))
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}", error.key) from None
    return evaluations


def write_list(path: str | Path, evaluations: list[Evaluation]) -> None:
    """Replace a run's list by ``evaluations``, whole or not at all."""
    replace_file(path, b"".join(map(_line, evaluations)))


def append_line(path: str | Path, evaluation: Evaluation) -> None:
    """Add one evaluation to a run's list, forced to disk.

    Raises:
        RecipeError: the file cannot be written; what was begun is cut off again.
    """
    files.append_line(path, _line(evaluation))


def _line(evaluation: Evaluation) -> bytes:
    return (json.dumps(_plain(evaluation), separators=(",", ":"), allow_nan=False) + "\n").encode()


def _plain(evaluation: Evaluation) -> dict[str, Any]:
    content = _content(evaluation)
    return {"format": FORMAT, "version": VERSION, "sha256": _checksum(content), **content}


def _content(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that the checksum covers, in plain values."""
    content: dict[str, Any] = {
        "provenance": asdict(evaluation.provenance),
        "text": evaluation.text(),
        "classes": {
            name: {
                "data": list(results.data),
                "teacher": results.teacher,
                "summary": results.summary(),
                "calibration": results.bins.tolist(),
                "sequences": list(results.sequences),
                "sums": {key: results.sums[key].tolist() for key in SUMS if key in results.sums},
            }
            for name, results in evaluation.classes.items()
        },
    }
    if evaluation.pairs is not None:
        content[_PAIRS] = _plain_pairs(evaluation.pairs)
    return content


def _plain_pairs(pairs: MeasuredPairs) -> dict[str, Any]:
    return {
        "data": list(pairs.data),
        "reference": pairs.against,
        "loss": asdict(pairs.spec),
        "summary": pairs.summary(),
        "pairs": list(pairs.hashes),
        "sums": pairs.sums(),
    }


def _checksum(content: dict[str, Any]) -> str:
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError:
        raise RecipeError(
            "evaluation: a loss is not finite, which no file of evaluations holds; the model, a "
            "teacher, or a label beyond the vocabulary gave it"
        ) from None
    return hashlib.sha256(text.encode()).hexdigest()


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RecipeError(
            f"cannot be read ({reason}); give an evaluation, relative to {Path.cwd()}"
        ) from None


def _parse(text: str) -> Evaluation:
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = typed.one_line(str(error))
        raise RecipeError(f"is damaged or no JSON ({reason}); {_AGAIN}") from None
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise RecipeError(f"is no evaluation (its format is not {FORMAT!r})")
    if type(plain.get("version")) is not int or plain["version"] != VERSION:
        raise RecipeError(
            f"version: {show(plain.get('version'))} is not known here; this package reads version "
            f"{VERSION}: measure again, or use the package that wrote it",
            "version",
        )
    own = (_PAIRS,) if _PAIRS in plain else ()
    typed.check_keys("", plain, (*_KEYS, *own), _AGAIN)
    provenance = typed.build(Provenance, plain["provenance"], "provenance")
    if not isinstance(plain["classes"], dict):
        raise _wrong("classes", "is not a mapping")
    classes = {
        name: _class(f"classes.{name}", results) for name, results in plain["classes"].items()
    }
    pairs = _pairs(plain[_PAIRS]) if own else None
    covered = ("provenance", "text", "classes", *own)
    if plain["sha256"] != _checksum({key: plain[key] for key in covered}):
        raise RecipeError(f"sha256: does not fit the content, which was changed; {_AGAIN}")
    evaluation = Evaluation(provenance, classes, pairs)
    if plain["text"] != evaluation.text():
        raise _wrong("text", "is not the hash of the sequences")
    for name, results in classes.items():
        summary = plain["classes"][name]["summary"]
        _check_summary(f"classes.{name}.summary", summary, results.summary())
    if pairs is not None:
        _check_summary(f"{_PAIRS}.summary", plain[_PAIRS]["summary"], pairs.summary())
    return evaluation


def _check_summary(key: str, plain: Any, expected: Mapping[str, float | None]) -> None:
    typed.check_keys(key, plain, tuple(expected), _AGAIN)
    for name, value in expected.items():
        stored = plain[name]
        if value is None or stored is None:
            right = stored is value
        else:
            number = type(stored) in (int, float)
            right = number and math.isclose(stored, value, rel_tol=1e-9, abs_tol=1e-12)
        if not right:
            raise _wrong(f"{key}.{name}", "does not follow from the sums")


def _class(key: str, plain: Any) -> ClassEvaluation:
    typed.check_keys(key, plain, _CLASS_KEYS, _AGAIN)
    sequences = typed.build(list[str], plain["sequences"], f"{key}.sequences")
    if sequences != sorted(sequences):
        raise _wrong(f"{key}.sequences", "is not sorted")
    sums = typed.build(dict[str, list[float]], plain["sums"], f"{key}.sums")
    for name in ALWAYS:
        if name not in sums:
            raise _wrong(f"{key}.sums.{name}", "is missing")
    for name, values in sums.items():
        if name not in SUMS:
            raise _wrong(f"{key}.sums.{name}", "is not known in this version")
        if len(values) != len(sequences):
            raise _wrong(
                f"{key}.sums.{name}",
                f"has {len(values)} entries for {len(sequences)} sequences",
            )
        if max(map(abs, values), default=0) > LARGEST:
            raise _wrong(f"{key}.sums.{name}", "has a number beyond what float32 holds")
        if name in COUNTS and not all(value == 0 or 1e-3 <= value <= 2**53 for value in values):
            raise _wrong(f"{key}.sums.{name}", "has a number that is no count")
    bins = typed.build(list[list[float]], plain["calibration"], f"{key}.calibration")
    if [len(row) for row in bins] != [BINS] * 3:
        raise _wrong(f"{key}.calibration", f"is not three rows of {BINS}")
    if any(not 0 <= number <= 2**53 for row in bins for number in row):
        raise _wrong(f"{key}.calibration", "has a number that is no count")
    return ClassEvaluation(
        tuple(sequences),
        {name: np.array(values) for name, values in sums.items()},
        np.array(bins),
        typed.build(str | None, plain["teacher"], f"{key}.teacher"),
        tuple(typed.build(list[str], plain["data"], f"{key}.data")),
    )


def _pairs(plain: Any) -> MeasuredPairs:
    from megatron_moe_inject.losses.preference import PreferenceSpec
    from megatron_moe_inject.preference.measured_pairs import MeasuredPairs

    typed.check_keys(_PAIRS, plain, _PAIRS_KEYS, _AGAIN)
    hashes = typed.build(list[str], plain["pairs"], f"{_PAIRS}.pairs")
    if hashes != sorted(hashes) or not hashes:
        raise _wrong(f"{_PAIRS}.pairs", "is not sorted, or empty")
    against = typed.build(str | None, plain["reference"], f"{_PAIRS}.reference")
    sums = typed.build(dict[str, list[float]], plain["sums"], f"{_PAIRS}.sums")
    names = ["log_prob", "tokens", *([] if against is None else ["reference_log_prob"])]
    typed.check_keys(
        f"{_PAIRS}.sums", sums, [f"{n}_{side}" for n in names for side in ("chosen", "rejected")],
        _AGAIN,
    )  # fmt: skip
    for name, values in sums.items():
        key = f"{_PAIRS}.sums.{name}"
        if len(values) != len(hashes):
            raise _wrong(key, f"has {len(values)} entries for {len(hashes)} pairs")
        if name.startswith("tokens"):
            if not all(1 <= value <= 2**53 for value in values):
                raise _wrong(key, "has a number that is no count")
        elif not all(-LARGEST <= value <= 0 for value in values):
            raise _wrong(key, "has a number that is no log-probability")
    try:
        spec = typed.build(PreferenceSpec, plain["loss"], f"{_PAIRS}.loss")
    except ValueError as error:
        raise _wrong(f"{_PAIRS}.loss", str(error)) from None
    data = tuple(typed.build(list[str], plain["data"], f"{_PAIRS}.data"))
    return MeasuredPairs.of_sums(sums, hashes=tuple(hashes), spec=spec, against=against, data=data)


def _wrong(key: str, problem: str) -> RecipeError:
    return RecipeError(f"{key}: {problem}; {_AGAIN}", key)
