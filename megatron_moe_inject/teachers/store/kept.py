"""What of each token ``moe-inject store-teacher`` keeps, by its options: ids, states, or chunks of
text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moe_inject.host.errors import Failure, RecipeError, fail
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.teachers.store.chunk_format import FP16, MOST_IDS
from megatron_moe_inject.teachers.store.manifest import StoredChunks, StoredStates
from megatron_moe_inject.teachers.store.row_format import DRAWN, PRECISIONS
from megatron_moe_inject.teachers.store.rules import taught_by
from megatron_moe_inject.teachers.store.writer import file_sha256

if TYPE_CHECKING:
    from megatron_moe_inject.teachers.store.chunk_plan import WrittenChunks

OUTPUT = "--output"
TOP = 64
"""Ids of each token, unless another number is asked for."""
_TOKENIZER_FILES = (
    "added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip


@dataclass(frozen=True)
class Choices:
    """What the writer is asked for, beside recipe and flags.

    Attributes:
        output: the store's folder.
        teacher: of the recipe; None for the only one.
        top: ids of each token; None for 64.
        mass: see ``StorePlan``.
        log_probs: their precision; None for ``packed``, of chunks of text for ``fp16``.
        temperatures: None for those of the recipe.
        context: None for ``--seq-length``, of chunks of text for twice that.
        overlap: None for a quarter of the context.
        documents: which of each data set; None for all.
        shard_tokens: see ``StorePlan``; None for a million, of states an eighth of that.
        pass_tokens: of one forward pass of the teacher.
        draw: ids to draw of each token in the place of the most likely; 0 for these.
        states: precision of states to keep in the place of ids, see ``state_format``; None for
            ids.
    """

    output: Path
    teacher: str | None = None
    top: int | None = None
    mass: float | None = None
    log_probs: str | None = None
    temperatures: Sequence[float] | None = None
    context: int | None = None
    overlap: int | None = None
    documents: tuple[int, int] | None = None
    shard_tokens: int | None = None
    pass_tokens: int = 1 << 14
    draw: int = 0
    states: str | None = None

    def failure(self, problem: str, remedy: str) -> RecipeError:
        """The error that names the store."""
        return fail(OUTPUT, str(self.output), problem, remedy)


def check_no_ids(name: str, choices: Choices) -> None:
    """Refuse options of what a teacher with another tokenizer has not.

    Raises:
        RecipeError: names the option.
    """
    for key in ("top", "mass", "draw", "states", "temperatures"):
        value = getattr(choices, key)
        if value:
            raise fail(
                f"--{key}", value,
                f"is of the student's tokens, and teachers.{name} has align: chunks: chunks of "
                "text are kept", "leave it out",
            )  # fmt: skip


def kept_chunks(written: WrittenChunks, choices: Choices, vocab_size: int) -> dict[str, Any]:
    """Fields of the plan of a store of chunks.

    Raises:
        RecipeError: more ids of the student than rows have room for.
    """
    if vocab_size > MOST_IDS:
        raise fail(
            "--tokenizer-model", f"{vocab_size} ids", "are more than a store of chunks takes",
            f"use a tokenizer of at most {MOST_IDS:,} ids",
        )  # fmt: skip
    digests = tokenizer_digests(written.tokenizer, choices.failure)
    return {
        "slots": 1, "mass": None, "log_probs": written.log_probs, "temperatures": [1.0],
        "labels": False, "chunks": StoredChunks(digests, written.ids),
    }  # fmt: skip


def kept_tokens(
    recipe: Recipe,
    name: str,
    choices: Choices,
    *,
    vocab_size: int,
    excluded: list[int],
    states: tuple[int, str],
) -> dict[str, Any]:
    """Fields of the plan of a store of ids or states.

    Args:
        excluded: ids that get no probability.
        states: width and type of the teacher's.

    Raises:
        RecipeError: options that do not fit.
    """
    if choices.log_probs == FP16:
        raise fail(
            "--log-probs", FP16, f"is for chunks of text, and teachers.{name} has no align: chunks",
            f"write one of {', '.join(PRECISIONS)}",
        )  # fmt: skip
    if choices.states is not None:
        return {
            "slots": 1, "mass": choices.mass, "log_probs": choices.states, "temperatures": [1.0],
            "labels": False, "states": StoredStates(*states, excluded),
        }  # fmt: skip
    slots = min(choices.top or TOP, vocab_size - len(excluded))
    log_probs = choices.log_probs or PRECISIONS[0]
    if choices.draw:
        slots, log_probs = choices.draw, DRAWN
    return {
        "slots": slots, "mass": choices.mass, "log_probs": log_probs,
        "temperatures": _temperatures(recipe, name, choices),
    }  # fmt: skip


def _temperatures(recipe: Recipe, name: str, choices: Choices) -> list[float]:
    asked = choices.temperatures
    if asked is None:
        asked = [recipe.temperature(domain) for domain in taught_by(recipe, name)]
    for temperature in asked:
        if not 0 < temperature < float("inf"):
            raise fail("--temperatures", temperature, "is not positive", "write such as 1 2")
    if choices.draw:
        if len(set(asked)) != 1:
            raise fail(
                "--temperatures", sorted(set(asked)), "are several, and ids are drawn at one",
                "write a store for each, or name one",
            )  # fmt: skip
        return [float(asked[0])]
    return [1.0, *sorted({float(t) for t in asked} - {1.0})]


def tokenizer_file(files: Path, name: str) -> Path:
    """A file of a tokenizer, a folder or the only one."""
    return files / name if files.is_dir() else files


def tokenizer_digests(files: Path | None, failure: Failure) -> dict[str, str]:
    """SHA-256 of the files of a tokenizer that are there, by name."""
    if files is None or not files.exists():
        return {}
    names = _TOKENIZER_FILES if files.is_dir() else (files.name,)
    there = [name for name in names if tokenizer_file(files, name).is_file()]
    return {name: file_sha256(tokenizer_file(files, name), failure) for name in there}
