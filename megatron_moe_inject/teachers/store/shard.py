"""A shard of a store: one safetensors file with what is known of some consecutive documents.

    rows           uint8 [bytes]     the rows of all documents, one after the other (row_format.py)
    counts         uint16 [r]        ids of each row; not there where all rows have as many
    lengths        int64 [d]         tokens of each document; one of L tokens has L - 1 rows, since
                                     nothing follows its last one
    block_begins   int64 [blocks+1]  where each block of 64 rows begins among the bytes
    block_digests  uint8 [blocks, 16]  BLAKE2b of each block's bytes

The header names the store that the shard belongs to, its place in it, and the SHA-256 of each
tensor but ``rows``, of whose bytes the digests of the blocks answer. So a reader that knows the
header's own checksum checks exactly what it reads, when it reads it.

Shapes: r rows, d documents.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_moe_inject.host.safetensors_file import (
    DamagedFileError,
    SafetensorsFile,
    header_of,
    stored_bytes,
)
from megatron_moe_inject.teachers.store.manifest import Layout

BLOCK = 64
_DIGEST = 16
_INDEX = ("lengths", "counts", "block_begins", "block_digests")


def shard_bytes(
    content: np.ndarray,
    counts: np.ndarray | None,
    lengths: Sequence[int],
    layout: Layout,
    identity: Mapping[str, str],
) -> tuple[bytes, str]:
    """A whole file, and the SHA-256 of its header.

    Args:
        content: uint8 [r, widest], see ``RowFormat.encode``.
        counts: [r] ids of each row; None where all have ``slots``.
        lengths: of the documents.
        layout: of the rows.
        identity: which shard of which store it is, as texts.

    Raises:
        ValueError: another number of rows than documents of such lengths have.
    """
    expected = sum(max(0, length - 1) for length in lengths)
    if len(content) != expected:
        raise ValueError(f"{len(content)} rows of documents that have {expected}")
    sizes = _sizes(counts, len(content), layout)
    rows = content[np.arange(content.shape[1]) < sizes[:, None]]
    ends = np.concatenate([[0], np.cumsum(sizes)])
    begins = np.append(ends[:-1:BLOCK], ends[-1]) if len(content) else np.zeros(1, np.int64)
    flat = memoryview(rows)
    digests = [_digest(flat[a:b]) for a, b in itertools.pairwise(begins)]
    tensors = {
        "lengths": torch.tensor(list(lengths), dtype=torch.int64),
        "block_begins": torch.from_numpy(begins.astype(np.int64)),
        "block_digests": torch.frombuffer(
            bytearray(b"".join(digests)), dtype=torch.uint8
        ).view(-1, _DIGEST) if digests else torch.zeros(0, _DIGEST, dtype=torch.uint8),
        "rows": torch.from_numpy(rows),
    }  # fmt: skip
    if counts is not None:
        tensors["counts"] = torch.from_numpy(counts.astype(np.uint16))
    metadata = dict(identity)
    for name in _INDEX:
        if name in tensors:
            digest = hashlib.sha256(stored_bytes(tensors[name])).hexdigest()
            metadata[f"sha256.{name}"] = digest
    header, places = header_of(
        [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()], metadata
    )
    parts = [header, *(bytes(stored_bytes(tensors[name])) for name in places)]
    return b"".join(parts), hashlib.sha256(header).hexdigest()


def _sizes(counts: np.ndarray | None, rows: int, layout: Layout) -> np.ndarray:
    if counts is None:
        return np.full(rows, layout.row_bytes(layout.slots), np.int64)
    return layout.bytes_of(counts.astype(np.int64))


def _digest(content: memoryview | bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()


class ShardReader:
    """Reads rows of a shard; everything is checked before it is given away.

    Args:
        path: the file.
        layout: of its rows.
        identity: which shard it must be.
        header_sha256: what its header must be; None to believe it.
        has_counts: whether rows have numbers of ids of their own.

    Attributes:
        header_sha256: of its header.
        lengths: int64 [d] tokens of each document.
        size: of the file.

    Raises:
        DamagedFileError: it is another file, was cut off or changed.
        OSError: it cannot be read.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        identity: Mapping[str, str],
        header_sha256: str | None,
        has_counts: bool,
    ) -> None:
        self._layout = layout
        file = SafetensorsFile.open(path)
        self.header_sha256 = hashlib.sha256(file.header).hexdigest()
        if header_sha256 is not None and self.header_sha256 != header_sha256:
            raise DamagedFileError("is not the file that the manifest names")
        metadata = file.metadata or {}
        if any(metadata.get(key) != value for key, value in identity.items()):
            raise DamagedFileError("belongs to another store", "write the store into a new folder")
        names = {"rows", "lengths", "block_begins", "block_digests"}
        if set(file.tensors) != names | ({"counts"} if has_counts else set()):
            raise DamagedFileError("does not hold the tensors of a shard")
        index = {}
        for name in _INDEX:
            if name not in file.tensors:
                continue
            tensor = file.read(name)
            digest = hashlib.sha256(stored_bytes(tensor)).hexdigest()
            if metadata.get(f"sha256.{name}") != digest:
                raise DamagedFileError(f"has other {name} than its header says")
            index[name] = tensor.numpy()
        self.lengths = index["lengths"]
        self._counts = index.get("counts")
        self._begins, self._digests = index["block_begins"], index["block_digests"]
        rows = np.maximum(self.lengths - 1, 0)
        # Row of each document's first token; behind the last document the number of rows.
        self._first_rows = np.concatenate([[0], np.cumsum(rows)])
        self._first_tokens = np.concatenate([[0], np.cumsum(self.lengths)])
        self.rows = int(self._first_rows[-1])
        self._check(file.tensors["rows"].bytes)
        self.size = file.size
        self._offset = file.tensors["rows"].begin
        self._handle = os.open(path, os.O_RDONLY)

    def _check(self, size: int) -> None:
        begins, blocks = self._begins, -(-self.rows // BLOCK)
        if len(begins) != blocks + 1 or self._digests.shape != (blocks, _DIGEST):
            raise DamagedFileError("has another number of blocks than rows")
        if self._counts is not None and (
            len(self._counts) != self.rows
            or (self.rows and not 1 <= self._counts.min() <= self._counts.max() <= self._slots)
        ):
            raise DamagedFileError("has impossible numbers of ids")
        sizes = _sizes(self._counts, self.rows, self._layout)
        expected = np.concatenate([[0], np.add.reduceat(sizes, range(0, self.rows, BLOCK))]) if (
            self.rows
        ) else np.zeros(1)  # fmt: skip
        if not np.array_equal(np.cumsum(expected), begins) or begins[-1] != size:
            raise DamagedFileError("has blocks that do not fit its rows")

    @property
    def _slots(self) -> int:
        return self._layout.slots

    def close(self) -> None:
        """Let the file go."""
        os.close(self._handle)

    def rows_of(self, tokens: np.ndarray) -> np.ndarray:
        """The row of each token, counted from the shard's first; -1 for the last of a document."""
        document = np.searchsorted(self._first_tokens, tokens, side="right") - 1
        place = tokens - self._first_tokens[document]
        rows = self._first_rows[document] + place
        return np.where(place < self.lengths[document] - 1, rows, -1)

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bytes [t, widest] and numbers of ids [t] of some rows.

        Raises:
            DamagedFileError: a block is not what it was when the shard was written.
            OSError: it cannot be read.
        """
        content = np.zeros((len(rows), self._layout.widest), np.uint8)
        counts = np.zeros(len(rows), np.int64)
        blocks = rows // BLOCK
        # Of blocks that follow each other one read.
        order = np.argsort(rows, kind="stable")
        wanted = np.unique(blocks)
        for run in np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1):
            if not len(run):
                continue
            first, last = int(run[0]), int(run[-1])
            stored = self._blocks(first, last)
            begin, end = first * BLOCK, min(self.rows, (last + 1) * BLOCK)
            own = None if self._counts is None else self._counts[begin:end]
            sizes = _sizes(own, end - begin, self._layout)
            begins = np.cumsum(sizes) - sizes
            low = np.searchsorted(rows[order], begin)
            high = np.searchsorted(rows[order], end)
            members = order[low:high]
            at = rows[members] - begin
            padded = np.concatenate([stored, np.zeros(self._layout.widest, np.uint8)])
            content[members] = padded[begins[at, None] + np.arange(self._layout.widest)]
            counts[members] = self._slots if own is None else own[at]
        return content, counts

    def _blocks(self, first: int, last: int) -> np.ndarray:
        begins = self._begins[first : last + 2]
        size = int(begins[-1] - begins[0])
        parts, at = [], self._offset + int(begins[0])
        while size:
            part = os.pread(self._handle, size, at)
            if not part:
                raise DamagedFileError("ends within rows")
            parts.append(part)
            size, at = size - len(part), at + len(part)
        content = b"".join(parts)
        flat, offset = memoryview(content), int(begins[0])
        for block, (a, b) in enumerate(itertools.pairwise(begins), start=first):
            if _digest(flat[a - offset : b - offset]) != self._digests[block].tobytes():
                raise DamagedFileError(f"was changed or is damaged in rows {block * BLOCK} and on")
        return np.frombuffer(content, np.uint8)
