"""Copies a Megatron ``torch_dist`` checkpoint on one rank, with its parts in other places.

A stored part of a tensor is a range of bytes that the index calls by the tensor's name and by where
the part begins. So a part that stays as it is can go to another place, or to several, without being
read as a tensor: the bytes are copied once, whatever the places. What is new is written beside.
Memory is bounded by one block of bytes, and by one new tensor.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import io
import itertools
import pickle
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_moe_inject.host.stored_checkpoint import joined_checksum, part_name
from megatron_moe_inject.host.torch_dist import (
    COMMON_OBJECT,
    INDEX,
    TorchDistCheckpoint,
    damaged,
    is_training_state,
)
from megatron_moe_inject.host.torch_dist_copy import refuse_links

_BLOCK = 1 << 24
_NEW_FILE = "__new_{}.distcp"


class NewPart(NamedTuple):
    """A tensor's part that is not a stored one's bytes.

    Attributes:
        places: the name and the offset under which it is to be found, one or several.
        value: as many axes as the stored tensor.
    """

    places: Sequence[tuple[str, tuple[int, ...]]]
    value: torch.Tensor


class Rearranged(NamedTuple):
    """What a copy took.

    Attributes:
        checksum: ``stored_checkpoint.model_checksum`` of the original.
        copied, new: bytes.
    """

    checksum: str
    copied: int
    new: int


def rearranged_copy(
    checkpoint: TorchDistCheckpoint,
    folder: Path,
    *,
    placed: Mapping[MetadataIndex, Sequence[MetadataIndex]],
    sizes: Mapping[str, tuple[int, ...]],
    new: Iterable[NewPart],
    common: Callable[[str], Mapping[str, Any]],
    progress: Callable[[Iterable[Any], int], Iterable[Any]],
) -> Rearranged:
    """Write a checkpoint of another one's parts and of new ones. No collective.

    Args:
        checkpoint: the original.
        folder: where the copy goes; must not exist.
        placed: by stored part where the copy has its bytes: nowhere, there, or in other places.
        sizes: of tensors that are not as large as the original's, or not in it.
        new: further parts, made one at a time.
        common: gives the common state, once the original's checksum is known.
        progress: wraps the stored parts to show how far it is.

    Raises:
        RecipeError: parts that are stored transformed, or cannot be read, or a symbolic link.
        OSError: the disk is full, say.
    """
    source = checkpoint.source
    others = _other_files(checkpoint)
    used = {
        checkpoint.folder / info.relative_path for info in checkpoint.metadata.storage_data.values()
    }
    refuse_links(checkpoint, [*used, *others])
    folder.mkdir(parents=True)
    index = _Index(checkpoint, sizes)
    digests: list[tuple[str, bytes]] = []
    parts = sorted(
        ((part, info) for part, info in checkpoint.metadata.storage_data.items()),
        key=lambda item: (item[1].relative_path, item[1].offset),
    )
    with _Files(checkpoint, folder) as files:
        for part, info in progress(parts, len(parts)):
            of_model = part.offset is not None and not is_training_state(part.fqn)
            targets = placed.get(part, ())
            if not targets and not of_model:
                continue
            if getattr(info, "transform_descriptors", None):
                raise source.error(
                    "stores its tensors transformed (compressed, say)", "save it without"
                )
            begin, digest = files.copy(info, kept=bool(targets))
            if of_model:
                digests.append((part_name(part), digest))
            for target in targets:
                index.place(part, target, dataclasses.replace(info, offset=begin))
        copied = files.written
    checksum = joined_checksum(digests)
    with (folder / _free_name(used)).open("xb") as file:
        for item in new:
            index.add(item, _stored(file, item.value.contiguous().clone()))
        state = dict(common(checksum))
        if COMMON_OBJECT in checkpoint.metadata.state_dict_metadata:
            index.add_object(COMMON_OBJECT, _stored(file, [state]))
        written = file.tell()
    if (checkpoint.folder / "common.pt").is_file():
        torch.save(state, folder / "common.pt")
    (folder / INDEX).write_bytes(pickle.dumps(index.metadata()))
    for path in others:
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)
    return Rearranged(checksum, copied, written)


class _Index:
    """The copy's ``.metadata``."""

    def __init__(
        self, checkpoint: TorchDistCheckpoint, sizes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._original = checkpoint.metadata
        self._sizes = sizes
        self._state: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._storage: dict[MetadataIndex, Any] = {}
        self._chunks = {
            name: {tuple(chunk.offsets): chunk.sizes for chunk in stored.chunks}
            for name, stored in self._original.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def place(self, part: MetadataIndex, target: MetadataIndex, info: Any) -> None:
        stored = self._original.state_dict_metadata[part.fqn]
        if not isinstance(stored, TensorStorageMetadata):
            self.add_object(target.fqn, info)
            return
        assert part.offset is not None, part
        assert target.offset is not None, target
        size = self._sizes.get(target.fqn, tuple(stored.size))
        shape = self._chunks[part.fqn][tuple(part.offset)]
        self._tensor(target.fqn, size, stored.properties, tuple(target.offset), shape, info)

    def add(self, item: NewPart, info: Any) -> None:
        for name, offset in item.places:
            original = self._original.state_dict_metadata.get(name)
            size = self._sizes.get(name)
            if size is None:
                assert isinstance(original, TensorStorageMetadata), name
                size = tuple(original.size)
            properties = TensorProperties(dtype=item.value.dtype)
            self._tensor(name, size, properties, offset, item.value.shape, info)

    def add_object(self, name: str, info: Any) -> None:
        self._state[name] = BytesStorageMetadata()
        self._storage[MetadataIndex(name)] = info

    def _tensor(
        self,
        name: str,
        size: tuple[int, ...],
        properties: TensorProperties,
        offset: tuple[int, ...],
        shape: torch.Size,
        info: Any,
    ) -> None:
        stored = self._state.get(name)
        if stored is None:
            stored = TensorStorageMetadata(properties, torch.Size(size), [])
            self._state[name] = stored
        assert isinstance(stored, TensorStorageMetadata), name
        assert (tuple(stored.size), stored.properties.dtype) == (size, properties.dtype), name
        place = MetadataIndex(name, torch.Size(offset))
        assert place not in self._storage, f"{name} is written twice at {offset}"
        stored.chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(shape)))
        self._storage[place] = info

    def metadata(self) -> Any:
        """The index; every tensor must be whole."""
        for name, stored in self._state.items():
            if isinstance(stored, TensorStorageMetadata):
                elements = sum(chunk.sizes.numel() for chunk in stored.chunks)
                assert elements == stored.size.numel(), f"{name}: {elements} of {stored.size}"
        metadata = copy.copy(self._original)
        metadata.state_dict_metadata, metadata.storage_data = self._state, self._storage
        # How ranks had planned to save it, which nothing reads.
        metadata.planner_data = None
        for name in ("all_local_plans",):
            if getattr(metadata, name, None) is not None:
                setattr(metadata, name, None)
        return metadata


class _Files:
    """The original's data files, read from their beginning to their end, and those of the copy.

    Attributes:
        written: bytes of the copy.
    """

    def __init__(self, checkpoint: TorchDistCheckpoint, folder: Path) -> None:
        self._checkpoint, self._folder = checkpoint, folder
        self._path: Path | None = None
        self._file: BinaryIO | None = None
        self._last: tuple[Any, bool, int, bytes] | None = None
        self.written = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def copy(self, info: Any, *, kept: bool) -> tuple[int, bytes]:
        """Read a range of bytes; returns where the copy has it, if it is kept, and its SHA-256.

        What has several names follows itself, and is copied once.
        """
        place = info.relative_path, info.offset, info.length
        if self._last is None or self._last[0] != place or (kept and not self._last[1]):
            self._last = (place, kept, *self._copied(info, kept))
        return self._last[2:]

    def _copied(self, info: Any, kept: bool) -> tuple[int, bytes]:
        path = self._checkpoint.folder / info.relative_path
        hasher, rest, begin = hashlib.sha256(), info.length, 0
        with contextlib.ExitStack() as stack:
            out = None
            if kept:
                out = stack.enter_context((self._folder / info.relative_path).open("ab"))
                begin = out.tell()
            source = self._open(path)
            source.seek(info.offset)
            while rest:
                block = self._read(source, path, min(rest, _BLOCK))
                hasher.update(block)
                if out is not None:
                    out.write(block)
                rest -= len(block)
        self.written += info.length if kept else 0
        return begin, hasher.digest()

    def _open(self, path: Path) -> BinaryIO:
        if self._file is None or self._path != path:
            self._close()
            try:
                self._path, self._file = path, path.open("rb")
            except OSError as error:
                raise damaged(self._checkpoint.source, path, error) from error
        return self._file

    def _read(self, source: BinaryIO, path: Path, length: int) -> bytes:
        try:
            block = source.read(length)
        except OSError as error:
            raise damaged(self._checkpoint.source, path, error) from error
        if not block:
            raise damaged(self._checkpoint.source, path, EOFError("it ends too early"))
        return block

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def _other_files(checkpoint: TorchDistCheckpoint) -> list[Path]:
    """What lies beside the data files and the index."""
    parted = {info.relative_path for info in checkpoint.metadata.storage_data.values()}
    return [
        path
        for path in sorted(checkpoint.folder.iterdir())
        if path.name not in parted
        and path.name not in (INDEX, "common.pt")
        and path.suffix != ".distcp"
    ]


def _free_name(used: Iterable[Path]) -> str:
    """A name for the file of new parts: the original may have been written here as well."""
    taken = {path.name for path in used}
    return next(name for n in itertools.count() if (name := _NEW_FILE.format(n)) not in taken)


def _stored(file: BinaryIO, value: Any) -> Any:
    """Append a value; returns where it is. By way of memory: what a full disk does to
    ``torch.save`` is no ``OSError``."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    stream = io.BytesIO()
    torch.save(value, stream)
    blob = stream.getvalue()
    info = _StorageInfo(Path(file.name).name, file.tell(), len(blob))
    file.write(blob)
    return info
