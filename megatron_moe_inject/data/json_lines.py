"""Text in JSON Lines files, compressed or not, some lines at a time.

Every line is an object with the text under one key. A mistake names the file and the line.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe_inject.host.errors import RecipeError, listing, one_line, show, show_path
from megatron_moe_inject.host.text import is_whole

FLAG = "--input"
_CHUNK_BYTES = 1 << 20
_COMPRESSED: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class Lines:
    """Some lines that follow each other in a file.

    Attributes:
        path: of the file.
        first: number of the first line, from 1.
        lines: as they are.
    """

    path: Path
    first: int
    lines: Sequence[bytes]

    def texts(self, field: str) -> Iterator[tuple[int, str]]:
        """The number and the text of each line; lines of white space are left out.

        Raises:
            RecipeError: a line that is no JSON object, or has no text under that key.
        """
        for number, line in enumerate(self.lines, self.first):
            if not line.isspace():
                yield number, self._text(number, line, field)

    def objects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The number and the object of each line; lines of white space are left out.

        Raises:
            RecipeError: a line that is no JSON object.
        """
        for number, line in enumerate(self.lines, self.first):
            if not line.isspace():
                yield number, self._object(number, line)

    def error(self, number: int, problem: str, remedy: str) -> RecipeError:
        """The error of a line."""
        return RecipeError(
            f"{FLAG}: {show_path(self.path)} line {number} {problem}; {remedy}", FLAG
        )

    def _object(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise self.error(
                number,
                f"is no JSON ({one_line(str(problem))})",
                "correct it; each line is an object of its own (JSON Lines)",
            ) from None
        if not isinstance(content, dict):
            raise self.error(number, f"is {show(content)} and no object", "correct it")
        return content

    def _text(self, number: int, line: bytes, field: str) -> str:
        content = self._object(number, line)
        if field not in content:
            known = listing(map(show, content), 6) or "(none)"
            raise self.error(
                number, f"has no {show(field)}", f"name one of its keys with --field: {known}"
            )
        text = content[field]
        if not isinstance(text, str):
            raise self.error(number, f"has {show(text)} under {show(field)}", "--field needs text")
        if not is_whole(text):
            raise self.error(
                number, f"has text under {show(field)} with half a character (a lone surrogate)",
                "correct it",
            )  # fmt: skip
        return text


def read_lines(paths: Sequence[Path]) -> Iterator[Lines]:
    """All lines of the files, one file after the other, about a megabyte at a time.

    ``.gz``, ``.bz2`` and ``.xz`` files are read as they are.

    Raises:
        RecipeError: a file that cannot be read or is damaged.
    """
    for path in paths:
        number = 1
        try:
            with _open(path) as file:
                while lines := file.readlines(_CHUNK_BYTES):
                    yield Lines(path, number, lines)
                    number += len(lines)
        except _DAMAGED as problem:
            reason = getattr(problem, "strerror", None) or one_line(str(problem))
            raise RecipeError(
                f"{FLAG}: {show_path(path)} cannot be read beyond line {number - 1} ({reason}); "
                "name a whole file",
                FLAG,
            ) from None


def check_inputs(paths: Sequence[Path]) -> None:
    """RecipeError unless these are files that ``read_lines`` takes."""
    for path in paths:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is not there"
            raise RecipeError(f"{FLAG}: {show_path(path)} {what}; name files of JSON lines", FLAG)
        if path.suffix in (".zst", ".parquet", ".arrow"):
            raise RecipeError(
                f"{FLAG}: {show_path(path)} is not read here; unpack or convert it to .jsonl or "
                ".jsonl.gz first",
                FLAG,
            )


def is_compressed(path: Path) -> bool:
    """Whether its size says little of how much text is in it."""
    return path.suffix in _COMPRESSED


def _open(path: Path) -> Any:
    return _COMPRESSED.get(path.suffix, open)(path, "rb")
