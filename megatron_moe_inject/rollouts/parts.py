"""The files that a command is to write, and those that an earlier one has left to do.

Prompts are written some to a file, and a file appears when it is whole, so that a command that was
interrupted goes on with the files that are not there. A file's name has the checkpoint's iteration,
its identity, and the settings; so other settings write other files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_moe_inject.host.errors import RecipeError, show_path
from megatron_moe_inject.rollouts.file_format import (
    SUFFIX,
    Damaged,
    Writer,
    parse_rollouts,
    read_content,
    write_rollouts,
)
from megatron_moe_inject.rollouts.prompts import Prompt
from megatron_moe_inject.rollouts.settings import digest


class Completion(NamedTuple):
    """What was written behind a prompt.

    Attributes:
        ids: of its tokens.
        log_probs: of each, in nats, by who wrote it; None where it is not kept.
    """

    ids: list[int]
    log_probs: list[float] | None = None


@dataclass(frozen=True)
class Part:
    """One file.

    Attributes:
        path: of it.
        prompts: that it answers.
    """

    path: Path
    prompts: Sequence[Prompt]


def parts_of(
    folder: Path, prompts: Sequence[Prompt], per_file: int, writer: Writer, settings: dict[str, Any]
) -> list[Part]:
    """All files of a command, in order."""
    whose = (writer.injection or writer.sha256 or "")[:8]
    name = f"{writer.iteration or 0:07d}-{whose}-{digest(settings)}"
    return [
        Part(
            folder / f"{name}-{number:05d}{SUFFIX}",
            prompts[number * per_file : (number + 1) * per_file],
        )
        for number in range(-(-len(prompts) // per_file))
    ]


def missing(parts: Sequence[Part], writer: Writer) -> list[int]:
    """Places of the files that are still to be written.

    Raises:
        RecipeError: a file has one of their names, and is no such file.
    """
    places = []
    for place, part in enumerate(parts):
        if not part.path.exists():
            places.append(place)
            continue
        try:
            found = parse_rollouts(read_content(part.path))
        except Damaged as error:
            raise RecipeError(
                f"--output: {show_path(part.path)} {error}; remove it to have it written again"
            ) from None
        if found.writer != writer or len(found.rollouts) != len(part.prompts):
            raise RecipeError(
                f"--output: {show_path(part.path)} is of another checkpoint or of other prompts; "
                "name another folder"
            )
    return places


def say_begin(todo: Sequence[int], parts: Sequence[Part]) -> None:
    """One line in the log before the first text."""
    texts = sum(len(parts[place].prompts) for place in todo)
    _say(f"{len(todo)} of {len(parts)} files to write, {texts} texts")


def say_done(done: int, todo: int, seconds: float) -> None:
    """One line in the log for files that are whole."""
    _say(f"{done} of {todo} files, {seconds:.0f} s")


def _say(text: str) -> None:
    print(f"megatron_moe_inject: rollouts: {text}", flush=True)


def write_part(
    part: Part, completions: Sequence[Completion], writer: Writer, settings: dict[str, Any]
) -> None:
    """Write one file whole.

    Raises:
        RecipeError: it cannot be written.
    """
    texts = [
        {"prompt": prompt.ids, "completion": completion.ids, "source": prompt.source}
        | ({} if completion.log_probs is None else {"log_probs": completion.log_probs})
        for prompt, completion in zip(part.prompts, completions, strict=True)
    ]
    part.path.parent.mkdir(parents=True, exist_ok=True)
    write_rollouts(part.path, writer, texts, settings)
