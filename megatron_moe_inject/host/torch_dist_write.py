"""Writes a Megatron ``torch_dist`` checkpoint slice by slice, without Megatron's model or a job.

What ``torch_dist`` reads, any layout can load: ``.metadata`` says which file holds which part of
which tensor. Parts are written as they come, at most ``_CHUNK_BYTES`` each, so that memory does not
grow with the model and a rank that loads some rows of a tensor reads little more than those.

A tensor can have several names, which share its bytes: layers of Transformer Engine and Megatron's
own ask for the same norm under two (``host.norm_names``). So can slices that are the same. Objects
without content are stored once, whatever their number. The common state is stored as each Megatron
reads it: 0.18 takes it from ``common.pt``, later ones from an object among the tensors, where they
find no such file.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import operator
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_moe_inject.host.torch_dist import COMMON_OBJECT, INDEX

_FILE_BYTES = 4 << 30
_CHUNK_BYTES = 64 << 20
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_COMMON_FORMAT = {"common_backend": "torch", "common_backend_version": 1}


class CheckpointWriter:
    """Writes one iteration's folder, on one process. No collective.

    Inside a ``with`` block; nothing is readable before ``finish``. Only what ends the block well
    may be used: write into a folder that takes its name afterwards (``host.files.new_folder``).

    Args:
        folder: a new folder, which is made.
        file_bytes: a data file that has grown so large is followed by another.
        chunk_bytes: parts of tensors are cut to this size along their first axis longer than 1.

    Attributes:
        bytes: written so far.
    """

    def __init__(
        self, folder: Path, *, file_bytes: int = _FILE_BYTES, chunk_bytes: int = _CHUNK_BYTES
    ) -> None:
        self._folder = folder
        self._file_bytes, self._chunk_bytes = file_bytes, chunk_bytes
        self._state: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._storage: dict[MetadataIndex, Any] = {}
        self._filled: dict[str, int] = {}
        self._files = 0
        self._file: BinaryIO | None = None
        self._nothing: Any = None
        self.bytes = 0

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def tensor(
        self,
        names: Sequence[str],
        size: Sequence[int],
        place: Sequence[int],
        value: torch.Tensor,
        also: Sequence[Sequence[int]] = (),
    ) -> None:
        """Write one slice of a stored tensor.

        Args:
            names: under which it is stored, all for the same bytes.
            size: of the whole stored tensor.
            place: where the slice begins in it, indices of its leading axes; 0 on the others.
            value: the slice, ``[*size]`` but for axes that it takes a part of; leading axes of size
                1 may be left out.
            also: other places of the same bytes, which are stored once.

        Raises:
            OSError: the disk is full, say.
        """
        size = tuple(size)
        value = value.detach().reshape((1,) * (len(size) - value.dim()) + tuple(value.shape))
        begins = [(*at, *(0 for _ in range(len(size) - len(at)))) for at in (place, *also)]
        for begin in begins:
            inside = all(b + n <= s for b, n, s in zip(begin, value.shape, size, strict=True))
            assert inside, (names, size, begin, tuple(value.shape))
        for name in names:
            stored = self._state.get(name)
            if stored is None:
                properties = TensorProperties(dtype=value.dtype)
                stored = TensorStorageMetadata(properties, torch.Size(size), [])
                self._state[name] = stored
            assert isinstance(stored, TensorStorageMetadata), name
            assert (tuple(stored.size), stored.properties.dtype) == (size, value.dtype), name
            self._filled[name] = self._filled.get(name, 0) + value.numel() * len(begins)
        for inner, part in _parts(value, self._chunk_bytes):
            info = self._put(part.clone(memory_format=torch.contiguous_format))
            for name, begin in itertools.product(names, begins):
                offset = torch.Size(map(operator.add, begin, inner))
                stored = self._state[name]
                assert isinstance(stored, TensorStorageMetadata)
                stored.chunks.append(ChunkStorageMetadata(offset, part.shape))
                index = MetadataIndex(name, offset)
                assert index not in self._storage, f"{name} is written twice at {offset}"
                self._storage[index] = info

    def nothing(self, names: Iterable[str]) -> None:
        """Store objects that say nothing, such as ``_extra_state`` of layers not in FP8.

        Args:
            names: with their place, as ``megatron.core`` has them: ``a._extra_state/shard_0_1``.
        """
        for name in names:
            if self._nothing is None:
                self._nothing = self._put([None])
            self._state[name] = BytesStorageMetadata()
            self._storage[MetadataIndex(name)] = self._nothing

    def finish(self, common: Mapping[str, Any]) -> None:
        """Write what Megatron stores once for all ranks, and the index: the checkpoint is whole.

        Args:
            common: ``args``, ``iteration``, ``checkpoint_version``.

        Raises:
            OSError: the disk is full, say.
        """
        for name, stored in self._state.items():
            if isinstance(stored, TensorStorageMetadata):
                expected = math.prod(stored.size)
                assert self._filled[name] == expected, f"{name}: {self._filled[name]} of {expected}"
        common = dict(common)
        self._state[COMMON_OBJECT] = BytesStorageMetadata()
        self._storage[MetadataIndex(COMMON_OBJECT)] = self._put([common])
        assert self._file is not None
        self._file.close()
        (self._folder / "common.pt").write_bytes(_saved(common))
        (self._folder / "metadata.json").write_text(json.dumps(_FORMAT | _COMMON_FORMAT))
        index = Metadata(self._state, storage_data=self._storage)
        (self._folder / INDEX).write_bytes(pickle.dumps(index))

    def _put(self, value: Any) -> Any:
        """Write a value to the file in hand, or the next; returns where it is.

        By way of memory: what a full disk does to ``torch.save`` is no ``OSError``.
        """
        blob = _saved(value)
        if self._file is None or self._file.tell() >= self._file_bytes:
            if self._file is not None:
                self._file.close()
            self._file = (self._folder / f"__0_{self._files}.distcp").open("wb")
            self._files += 1
        info = _StorageInfo(Path(self._file.name).name, self._file.tell(), len(blob))
        self._file.write(blob)
        self.bytes += len(blob)
        return info


def _parts(value: torch.Tensor, most: int) -> Iterable[tuple[tuple[int, ...], torch.Tensor]]:
    """Parts of a slice along its first axis longer than 1, each with where it begins in it."""
    begin = (0,) * value.dim()
    axis = next((axis for axis, n in enumerate(value.shape) if n > 1), None)
    if axis is None or value.nbytes <= most:
        yield begin, value
        return
    rows = max(1, most // (value.nbytes // value.shape[axis]))
    for start in range(0, value.shape[axis], rows):
        part = value.narrow(axis, start, min(rows, value.shape[axis] - start))
        yield (*begin[:axis], start, *begin[axis + 1 :]), part


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
