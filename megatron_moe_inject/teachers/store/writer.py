"""Writes a store shard by shard, so that whatever ends it, what was written stays and is gone on
with.

Which documents a shard holds follows from the plan alone. Several processes, on one machine or on
several, may take every n-th shard each; who finds that all are there writes the manifest. A shard
takes its name when it is whole and on disk (``host.files``), and a store is one when its manifest
is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_moe_inject.host.errors import Failure
from megatron_moe_inject.host.files import replace_file
from megatron_moe_inject.host.safetensors_file import DamagedFileError
from megatron_moe_inject.teachers.store.head import HEAD
from megatron_moe_inject.teachers.store.manifest import (
    MANIFEST,
    PLAN,
    Manifest,
    StoredShard,
    StorePlan,
    read_plan,
    shard_name,
    write_json,
)
from megatron_moe_inject.teachers.store.reader import open_shard, shard_identity
from megatron_moe_inject.teachers.store.shard import shard_bytes

Content = tuple[np.ndarray, np.ndarray]
"""Of some documents: bytes of their rows [r, widest] and numbers of ids [r]."""


@dataclass(frozen=True)
class Piece:
    """The documents of one shard.

    Attributes:
        data: position of the data set.
        number: of the shard in it.
        first: of its documents.
        lengths: tokens of each.
        first_token: of the first document, in the ``.bin`` file.
    """

    data: int
    number: int
    first: int
    lengths: np.ndarray
    first_token: int

    @property
    def file(self) -> str:
        """Its name in the store's folder."""
        return shard_name(self.data, self.number)

    @property
    def rows(self) -> int:
        """Tokens that something will be known of."""
        return int(np.maximum(self.lengths - 1, 0).sum())


def pieces(
    plan: StorePlan, lengths: Sequence[np.ndarray], starts: Sequence[np.ndarray]
) -> Iterator[Piece]:
    """The shards of a plan, in order.

    Args:
        plan: what is written.
        lengths: of each data set, tokens of all its documents.
        starts: first token of each of them in the ``.bin`` file.
    """
    for data, stored in enumerate(plan.data):
        own = lengths[data][stored.first : stored.last]
        ends = np.cumsum(own)
        begin = number = 0
        while begin < len(own):
            before = int(ends[begin] - own[begin])
            end = int(np.searchsorted(ends, before + plan.shard_tokens)) + 1
            end = min(end, len(own))
            first = stored.first + begin
            yield Piece(data, number, first, own[begin:end], int(starts[data][first]))
            begin, number = end, number + 1


def _is_part(name: str) -> bool:
    """Whether a file is one of the plan that was never whole (``host.files.replace_file``)."""
    return name.startswith(f".{PLAN}.") and name.endswith(".part")


class StoreWriter:
    """Writes a store, or goes on with one.

    Args:
        folder: a new one, or one that a writer of the same plan has begun.
        plan: what is written.
        pieces: its shards.
        failure: makes errors; see ``errors.Failure``.

    Raises:
        RecipeError: the folder holds another store, or cannot be written.
    """

    def __init__(
        self, folder: Path, plan: StorePlan, pieces: Sequence[Piece], failure: Failure
    ) -> None:
        self._folder = folder
        self.plan = plan
        self.pieces = list(pieces)
        self._failure = failure
        self._done: dict[str, StoredShard] = {}
        begun = read_plan(folder, failure)
        if begun is None:
            # A writer that was killed at its first file leaves the part that it had begun.
            if folder.is_dir() and any(not _is_part(path.name) for path in folder.iterdir()):
                raise failure("is a folder with other things", "name a new one")
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise failure(f"cannot be made ({error.strerror})", "name a new folder") from None
            write_json(folder / PLAN, plan)
        elif begun.identity != plan.identity:
            new, old = asdict(plan), asdict(begun)
            key = next(key for key in new if new[key] != old[key])
            raise failure(
                f"is a store with other settings: {key} is {old[key]!r} there and {new[key]!r} now",
                "use the same flags to go on, or name a new folder",
            )
        for piece in self.pieces:
            if (folder / piece.file).is_file():
                self._done[piece.file] = self._found(piece)

    @property
    def missing(self) -> list[Piece]:
        """Shards that are still to be written, by whichever process."""
        return [
            piece
            for piece in self.pieces
            if piece.file not in self._done and not (self._folder / piece.file).is_file()
        ]

    def write(self, piece: Piece, content: Content) -> int:
        """Write a shard; its number of bytes.

        Raises:
            RecipeError: it cannot be written; those before are whole.
            ValueError: other rows than the documents have.
        """
        plan = self.plan
        counts = content[1] if plan.counted else None
        identity = shard_identity(plan, piece.data, piece.number)
        lengths = piece.lengths.tolist()
        whole, header = shard_bytes(content[0], counts, lengths, plan.row_format, identity)
        replace_file(self._folder / piece.file, whole)
        self._done[piece.file] = _shard(piece, len(whole), header)
        return len(whole)

    def _found(self, piece: Piece) -> StoredShard:
        """A shard that is there, its header and index checked."""
        try:
            reader = open_shard(self._folder, self.plan, piece.data, piece.number, piece.file, None)
            reader.close()
        except (DamagedFileError, OSError) as error:
            problem = getattr(error, "problem", f"cannot be read ({error})")
            raise self._failure(
                f"has {piece.file}, which {problem}", "remove that file; it is written again"
            ) from None
        if not np.array_equal(reader.lengths, piece.lengths):
            raise self._failure(
                f"has {piece.file}, which is of other documents", "name a new folder"
            )
        return _shard(piece, reader.size, reader.header_sha256)

    def finish(self, bin_sha256: Callable[[], list[str]]) -> Manifest | None:
        """Write the manifest, if all shards are there; None if some are not.

        Args:
            bin_sha256: gives the checksum of each ``.bin`` file.

        Raises:
            RecipeError: a shard of another process is damaged, or the manifest cannot be written.
        """
        if self.missing:
            return None
        for piece in self.pieces:
            if piece.file not in self._done:
                self._done[piece.file] = self._found(piece)
        shards = [self._done[piece.file] for piece in self.pieces]
        head = ""
        if self.plan.states is not None:
            head = file_sha256(self._folder / HEAD, self._failure)
        manifest = Manifest(self.plan, bin_sha256(), shards, head)
        write_json(self._folder / MANIFEST, manifest)
        return manifest


def _shard(piece: Piece, size: int, header: str) -> StoredShard:
    return StoredShard(
        piece.data,
        piece.number,
        piece.first,
        len(piece.lengths),
        piece.first_token,
        int(piece.lengths.sum()),
        piece.rows,
        size,
        header,
    )


def file_sha256(path: Path, failure: Failure) -> str:
    """SHA-256 of a file's content.

    Raises:
        RecipeError: it cannot be read.
    """
    try:
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise failure(
            f"needs {path}, which cannot be read ({error.strerror})", "see that it is there"
        ) from None
