"""A training run as a growing list on disk (``inject_run.jsonl``), for reports.

Each line is one JSON object. A ``start`` line says what began or resumed: recipe, plan, versions,
parameters. A ``step`` line holds what Megatron logged: means over the steps since the line before.
Lines are added by one write each, so that a reader of a running or killed run sees whole lines and
perhaps the beginning of another, which is left out. Numbers that are not finite, or beyond what
float32 holds, are ``null``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_moe_inject.evaluation.evaluation import LARGEST
from megatron_moe_inject.host import files, typed
from megatron_moe_inject.host.errors import (
    RecipeError,
    show,
)

FILE = "inject_run.jsonl"
FORMAT = "megatron_moe_inject.run"
VERSION = 1
_AGAIN = "restore the file from a copy"
_NEEDED = {"remedy": f"the line was changed; {_AGAIN}"}


@dataclass(frozen=True)
class Component:
    """Elements of one component of the student that train and that do not."""

    name: str = field(metadata=_NEEDED)
    trained: int = field(metadata=_NEEDED)
    frozen: int = field(metadata=_NEEDED)


@dataclass(frozen=True)
class Loaded:
    """What was loaded when a run began or was resumed, see ``host.student_load.Origin``."""

    checkpoint: str = field(metadata=_NEEDED)
    iteration: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Start:
    """A run that began or was resumed.

    Attributes:
        iteration: optimiser steps taken before.
        time: when, ISO 8601 in UTC.
        recipe: YAML, with the experts that were chosen.
        plan: as the run printed it.
        versions: by name of the package.
        parameters: of the whole student.
        world_size: processes.
        evaluations: the list of evaluations (``evaluation_file``).
        train_iters: iterations that the run is to take in all.
        injection: identity of the injection that it is part of (``host.lineage``).
        loaded: into the student; ``None`` in lines of earlier versions.
    """

    iteration: int = field(metadata=_NEEDED)
    time: str = field(metadata=_NEEDED)
    recipe: str = field(metadata=_NEEDED)
    plan: str = field(metadata=_NEEDED)
    versions: dict[str, str] = field(metadata=_NEEDED)
    parameters: list[Component] = field(metadata=_NEEDED)
    world_size: int = field(metadata=_NEEDED)
    evaluations: str = field(metadata=_NEEDED)
    train_iters: int = field(metadata=_NEEDED)
    injection: str = ""
    loaded: Loaded | None = None


@dataclass(frozen=True)
class Step:
    """What was logged after ``iteration`` optimiser steps.

    Attributes:
        samples: consumed since the beginning of training.
        steps: that the means are over, those skipped for overflow included.
        skipped: of them, steps without an update.
        seconds: mean wall-clock time of a step, evaluations and saving excluded.
        terms: means by name, as in Megatron's log line; None where not finite.
        grad_norm: of the last step; None where there is none or it is not finite.
        learning_rate: of the last step; None where the writing rank trains nothing.
    """

    iteration: int = field(metadata=_NEEDED)
    samples: int = field(metadata=_NEEDED)
    steps: int = field(metadata=_NEEDED)
    skipped: int = field(metadata=_NEEDED)
    seconds: float = field(metadata=_NEEDED)
    terms: dict[str, float | None] = field(metadata=_NEEDED)
    grad_norm: float | None = None
    learning_rate: float | None = None


_LONGEST = 1e10
"""Seconds: some centuries."""

_KINDS = {"start": Start, "step": Step}
Line = Start | Step


def finite(value: float | None) -> float | None:
    """The value, None where it is not finite in float32."""
    return value if value is not None and abs(value) <= LARGEST else None


def read_run(path: str | Path) -> list[Line]:
    """The lines of a run so far, in their order; empty where there is no file.

    Raises:
        RecipeError: the file cannot be read, or a line is damaged or of another version. The
            message begins with file and line.
    """
    where, lines = typed.one_line(str(path), 200), []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RecipeError(f"{where}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{where}: is damaged (not UTF-8 text); {_AGAIN}") from None
    for number, line in enumerate(files.whole_lines(text), start=1):
        try:
            lines.append(_parse(line))
        except RecipeError as error:
            raise RecipeError(f"{where}, line {number}: {error}", error.key) from None
    return lines


def kept(lines: Sequence[Line], iteration: int) -> list[Line]:
    """What stays of a run that goes on from ``iteration``: steps up to it and starts before it."""
    return [
        line
        for line in lines
        if line.iteration < iteration or (isinstance(line, Step) and line.iteration == iteration)
    ]


def write_run(path: str | Path, lines: Sequence[Line]) -> None:
    """Replace a run's list, whole or not at all."""
    files.replace_file(path, b"".join(map(_line, lines)))


def append(path: str | Path, line: Line) -> None:
    """Add a line to a run's list; see ``host.files.append_line``."""
    files.append_line(path, _line(line))


def _line(line: Line) -> bytes:
    kind = next(name for name, known in _KINDS.items() if isinstance(line, known))
    plain = {"format": FORMAT, "version": VERSION, "kind": kind, **asdict(line)}
    return (json.dumps(plain, separators=(",", ":"), allow_nan=False) + "\n").encode()


def _parse(line: str) -> Line:
    try:
        plain = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"is damaged or no JSON ({typed.one_line(str(error))}); {_AGAIN}"
        ) from None
    if not isinstance(plain, dict) or plain.pop("format", None) != FORMAT:
        raise RecipeError(f"is no line of a run (its format is not {FORMAT!r})")
    version = plain.pop("version", None)
    if version != VERSION:
        raise RecipeError(
            f"version: {show(version)} is not known here; this package reads version {VERSION}: "
            "use the package that wrote it",
            "version",
        )
    kind = plain.pop("kind", None)
    if kind not in list(_KINDS):
        raise RecipeError(f"kind: {show(kind)} is not known; a line is a start or a step", "kind")
    parsed = typed.build(_KINDS[kind], plain)
    if isinstance(parsed, Step):
        _check_numbers(parsed)
    return parsed


def _check_numbers(step: Step) -> None:
    """What is drawn and added up must be a number that a run can have."""
    numbers = {typed.child("terms", name): value for name, value in step.terms.items()}
    numbers |= {"grad_norm": step.grad_norm, "learning_rate": step.learning_rate}
    for key, value in numbers.items():
        if finite(value) != value:
            raise typed.fail(key, value, "is beyond what float32 holds", _AGAIN)
    if not 0 <= step.seconds <= _LONGEST:
        raise typed.fail("seconds", step.seconds, "is no time that a step takes", _AGAIN)
