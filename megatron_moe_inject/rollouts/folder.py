"""What is new in a folder of rollouts: one rank looks, all are told.

Files of this injection that are whole go onto the shelf, in the order of the iterations that wrote
them. What is left aside gets one line each: half or damaged, of another checkpoint, too old, a copy
of one that was read. A file whose checkpoint is still to come (training went back to an earlier
one) waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from megatron_moe_inject.host.errors import RecipeError, show_path
from megatron_moe_inject.rollouts.file_format import (
    SUFFIX,
    Damaged,
    Tokenize,
    Writer,
    parse_rollouts,
    read_content,
)
from megatron_moe_inject.rollouts.samples import samples_of_file
from megatron_moe_inject.rollouts.shelf import AgePolicy, Shelf, ShelfFile


@dataclass(frozen=True)
class Student:
    """Whose rollouts are read.

    Attributes:
        injection: identity of the injection.
        start: checksum of the model that it began with; None where nobody has read it.
        start_iteration: the iteration at which it began.
        vocab_size: ids of its tokenizer.
    """

    injection: str
    start: str | None
    start_iteration: int
    vocab_size: int

    def iteration_of(self, writer: Writer) -> int | None:
        """At which iteration of this injection it wrote; None where it is of another."""
        if writer.injection == self.injection and writer.iteration is not None:
            return writer.iteration
        if writer.injection is None and writer.sha256 is not None and writer.sha256 == self.start:
            return self.start_iteration
        return None


_Stamp = tuple[int, int]
"""When a file was last written, and its size."""


class News(NamedTuple):
    """What a look has found.

    Attributes:
        files: that are new and can be read.
        faults: why others are left aside, a line each.
        copies: a line for each copy of one that is read.
    """

    files: list[ShelfFile]
    faults: list[str]
    copies: list[str]

    def with_more(self, more: News) -> News:
        """Of two looks together."""
        return News(self.files + more.files, self.faults + more.faults, self.copies + more.copies)

    def plain(self) -> dict[str, Any]:
        """In plain values, for the other ranks."""
        return self._asdict() | {"files": [vars(file) for file in self.files]}

    @classmethod
    def of_plain(cls, values: Mapping[str, Any]) -> Self:
        """Of ``plain``."""
        return cls(**{**values, "files": [ShelfFile(**file) for file in values["files"]]})


class Folder:
    """One folder, as the first rank sees it.

    Args:
        path: need not exist yet.
        student: whose rollouts are wanted.
        sequence_length: of a sample.
        packed: whether a sample has several documents.
        age: what is too old.
        tokenize: see ``parse_rollouts``.
    """

    def __init__(
        self,
        path: Path,
        student: Student,
        *,
        sequence_length: int,
        packed: bool,
        age: AgePolicy,
        tokenize: Tokenize | None,
    ) -> None:
        self.path = path
        self._student = student
        self._length, self._packed = sequence_length, packed
        self._age = age
        self._tokenize = tokenize
        self._done: dict[str, _Stamp] = {}
        self._waiting: dict[str, tuple[_Stamp, ShelfFile]] = {}
        self._name_of: dict[str, str] = {}

    def look(self, shelf: Shelf, iteration: int) -> News:
        """What is new beside a shelf. Reads files that it has not read before.

        Raises:
            RecipeError: the folder cannot be listed.
        """
        news = News([], [], [])
        for name, stamp in self._listed():
            if self._done.get(name) == stamp:
                continue
            try:
                file = self._file(name, stamp)
                if file.iteration > iteration:  # training went back to an earlier checkpoint
                    continue
                self._sort_in(file, shelf, iteration, news)
            except Damaged as error:
                news.faults.append(f"{show_path(self.path / name)} {error}")
            self._done[name] = stamp
            self._waiting.pop(name, None)
        news.files.sort(key=lambda file: (file.iteration, file.name))
        return news

    def _listed(self) -> list[tuple[str, _Stamp]]:
        """Names of files with when they were last written, and their sizes; what is gone between
        two calls, and a link to nothing, is left for the next look."""
        entries = []
        try:
            for path in self.path.iterdir():
                if path.name.endswith(SUFFIX) and not path.name.startswith("."):
                    with contextlib.suppress(FileNotFoundError):
                        status = path.stat()
                        entries.append((path.name, (status.st_mtime_ns, status.st_size)))
        except FileNotFoundError:  # the folder is not there yet
            return []
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise RecipeError(
                f"rollouts: {show_path(self.path)} cannot be listed ({reason}); name a folder"
            ) from None
        return sorted(entries)

    def _file(self, name: str, stamp: _Stamp) -> ShelfFile:
        """A file as the shelf has it."""
        if name in self._waiting and self._waiting[name][0] == stamp:
            return self._waiting[name][1]
        whole = parse_rollouts(
            read_content(self.path / name), self._student.vocab_size, self._tokenize
        )
        iteration = self._student.iteration_of(whole.writer)
        if iteration is None:
            raise Damaged(
                f"was written by {_named(whole.writer)}, not by this injection "
                f"({self._student.injection[:8]}): rollouts of another student are not on-policy"
            )
        samples = samples_of_file(whole.rollouts, self._length, packed=self._packed)
        if not samples:
            raise Damaged(f"has no token to learn from in samples of {self._length} tokens")
        file = ShelfFile(name, whole.sha256, iteration, len(samples), whole.lm_loss)
        self._waiting[name] = stamp, file
        return file

    def _sort_in(self, file: ShelfFile, shelf: Shelf, iteration: int, news: News) -> None:
        """Put a whole file of this injection into the news.

        Raises:
            Damaged: it is too old.
        """
        first = self._name_of.setdefault(file.sha256, file.name)
        if first != file.name:
            path = show_path(self.path / file.name)
            news.copies.append(f"{path} is a copy of {first}, which is read once")
        elif not shelf.knows(file.sha256):  # as after a resume
            age = iteration - file.iteration
            if self._age.too_old(age):
                raise Damaged(
                    f"is of iteration {file.iteration}, {age} steps ago, where rollouts.max_age is "
                    f"{self._age.max_age}"
                )
            news.files.append(file)


def _named(writer: Writer) -> str:
    if writer.injection is None:
        return f"a checkpoint of no injection (model {(writer.sha256 or 'unknown')[:8]})"
    return f"injection {writer.injection[:8] or '(one of an earlier version)'}"
