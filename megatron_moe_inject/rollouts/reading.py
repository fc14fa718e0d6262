"""Reads samples out of files of rollouts that all ranks know of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_moe_inject.host.errors import show_path
from megatron_moe_inject.rollouts.file_format import (
    Damaged,
    Rollout,
    Tokenize,
    parse_rollouts,
    read_content,
)
from megatron_moe_inject.rollouts.samples import samples_of_file
from megatron_moe_inject.rollouts.shelf import Place, ShelfFile


class Unreadable(Exception):
    """A file that was there and whole is not any more; the message says which, and why."""


class FolderReader:
    """Of one folder, on a rank that reads data; keeps the files of the step at hand in memory.

    Args:
        path, sequence_length, packed, vocab_size, tokenize: as of ``folder.Folder``.
    """

    def __init__(
        self,
        path: Path,
        sequence_length: int,
        packed: bool,
        vocab_size: int,
        tokenize: Tokenize | None,
    ) -> None:
        self._path = path
        self._length, self._packed = sequence_length, packed
        self._vocab_size, self._tokenize = vocab_size, tokenize
        self._open: dict[str, tuple[Sequence[Rollout], list[list[int]]]] = {}

    def open(self, files: Iterable[ShelfFile]) -> None:
        """Have these files in memory, and no others.

        Raises:
            Unreadable: one is not what it was.
        """
        self._open = {
            file.sha256: self._open.get(file.sha256) or self._read(file) for file in files
        }

    def sample(self, place: Place) -> list[Rollout]:
        """The rollouts of a sample; its file is open."""
        rollouts, samples = self._open[place.file.sha256]
        return [rollouts[number] for number in samples[place.sample]]

    def _read(self, file: ShelfFile) -> tuple[Sequence[Rollout], list[list[int]]]:
        path = self._path / file.name
        try:
            whole = parse_rollouts(read_content(path), self._vocab_size, self._tokenize)
        except Damaged as error:
            raise Unreadable(f"{show_path(path)}, which was whole, {error}") from None
        samples = samples_of_file(whole.rollouts, self._length, packed=self._packed)
        if whole.sha256 != file.sha256 or len(samples) != file.samples:
            raise Unreadable(f"{show_path(path)} has another content than when it was found")
        return whole.rollouts, samples
