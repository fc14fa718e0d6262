"""A whole store, asked by data set and token.

Shards are opened when they are first asked, and the longest unused is closed where many are open,
so that a store of any size costs the memory of its largest documents' worth of index: 8 bytes for
each document and 0.4 for each row of the shards that are open.

Shapes: t tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np

from megatron_moe_inject.host.errors import Failure, RecipeError
from megatron_moe_inject.host.safetensors_file import DamagedFileError
from megatron_moe_inject.teachers.store.manifest import (
    Manifest,
    StoredShard,
    StorePlan,
    read_manifest,
)
from megatron_moe_inject.teachers.store.shard import ShardReader

OPEN_SHARDS = 64
"""Kept open at once."""


def shard_identity(plan: StorePlan, data: int, number: int) -> dict[str, str]:
    """What the header of a shard says that it is."""
    return {"store": plan.identity, "data": str(data), "shard": str(number)}


def open_shard(
    folder: Path, plan: StorePlan, data: int, number: int, file: str, header: str | None
) -> ShardReader:
    """Open one shard of a store; errors as of ``ShardReader``."""
    identity = shard_identity(plan, data, number)
    return ShardReader(folder / file, plan.row_format, identity, header, plan.counted)


class Store:
    """Reads a store.

    Args:
        folder: where it is.
        failure: makes errors; see ``errors.Failure``.
        manifest: of it, if it was read already.

    Attributes:
        manifest: what it says about itself.
        layout: of its rows.
        failure: as given.

    Raises:
        RecipeError: it is no store, not whole, damaged, or a shard is not there.
    """

    def __init__(self, folder: Path, failure: Failure, manifest: Manifest | None = None) -> None:
        self._folder = folder
        self.failure = failure
        self.manifest = read_manifest(folder, failure) if manifest is None else manifest
        self.layout = self.manifest.plan.row_format
        self._open: OrderedDict[str, ShardReader] = OrderedDict()
        self._shards: list[list[StoredShard]] = [[] for _ in self.manifest.plan.data]
        for shard in self.manifest.shards:
            self._shards[shard.data].append(shard)
            path = folder / shard.file
            if not path.is_file() or path.stat().st_size != shard.bytes:
                problem = "is cut off" if path.is_file() else "is not there"
                raise failure(
                    f"lacks a part: {shard.file}, of {shard.bytes:,} bytes, {problem}",
                    "copy it again, or let the writer go on",
                )
        self._ends = [
            np.array([shard.first_token + shard.tokens for shard in shards], np.int64)
            for shards in self._shards
        ]

    def read(self, data: int, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is stored of some tokens of a data set.

        Args:
            data: position of the data set in the manifest.
            tokens: [t] their places in its ``.bin`` file.

        Returns:
            Bytes [t, widest] and numbers of ids [t], see ``RowFormat.decode``; 0 ids for the last
            token of a document, of whose successor no teacher says anything.

        Raises:
            RecipeError: it has no such tokens, or the shard is damaged.
        """
        content = np.zeros((len(tokens), self.layout.widest), np.uint8)
        counts = np.zeros(len(tokens), np.int64)
        ends, shards = self._ends[data], self._shards[data]
        which = np.searchsorted(ends, tokens, side="right")
        for number in np.unique(which).tolist():
            members = np.flatnonzero(which == number)
            if number == len(shards) or tokens[members].min() < shards[number].first_token:
                raise self._lacks(data, int(tokens[members].min()))
            shard = shards[number]
            try:
                reader = self._reader(shard)
                rows = reader.rows_of(tokens[members] - shard.first_token)
                there = members[rows >= 0]
                content[there], counts[there] = reader.read(rows[rows >= 0])
            except DamagedFileError as error:
                raise self.failure(
                    f"has {shard.file}, which {error.problem}", error.remedy
                ) from None
            except OSError as error:
                raise self.failure(
                    f"has {shard.file}, which cannot be read ({error})", "copy it again"
                ) from None
        return content, counts

    def _lacks(self, data: int, token: int) -> RecipeError:
        stored = self.manifest.plan.data[data]
        return self.failure(
            f"says nothing about token {token:,} of {stored.name}: it has documents "
            f"{stored.first:,} to {stored.last - 1:,} of {stored.documents:,}",
            "store the whole data set, or train on what is stored",
        )

    def _reader(self, shard: StoredShard) -> ShardReader:
        reader = self._open.get(shard.file)
        if reader is None:
            plan = self.manifest.plan
            reader = open_shard(
                self._folder, plan, shard.data, shard.number, shard.file, shard.header_sha256
            )
            if (reader.rows, len(reader.lengths)) != (shard.rows, shard.documents):
                raise DamagedFileError("has other documents than the manifest says")
            self._open[shard.file] = reader
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard.file)
        return reader

    def close(self) -> None:
        """Let all files go."""
        while self._open:
            self._open.popitem()[1].close()
