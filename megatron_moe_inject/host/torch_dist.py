"""Reads a Megatron ``torch_dist`` checkpoint on one rank, without ``torch.distributed``.

Megatron's own loading entry agrees over the whole world, while only the ranks of the last
pipeline stage want a teacher, and a delta is made where no job runs. The format does not ask for
that: ``.metadata`` says which file holds which part of which tensor, so any process can read any
slice, whatever layout wrote it.

Trust: the format carries pickles. ``.metadata`` is read by an unpickler that knows the few
classes of the format and refuses every other name; ``common.pt`` and stored objects go through
``torch.load(weights_only=True)`` with the classes that Megatron registers as safe. The files that
``.metadata`` names are plain names in its folder, or an error. Even so any such checkpoint deserves
the trust that one gives to the student's own.

Megatron is imported only for what needs its classes: the common state, and checkpoints of old.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import json
import pickle
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_moe_inject.host.errors import (
    RecipeError,
    show,
)
from megatron_moe_inject.host.files import is_plain_name

INDEX = ".metadata"
COMMON_FILE = "common.pt"
COMMON_OBJECT = "common_state/shard_0_1"
_TRAINING_STATE = re.compile(
    r"(chained_\d+\.)?optimizer\.|(.*\.)?rng_state/|rerun_state_machine_state/|common_state/"
)
DAMAGED = (OSError, RuntimeError, ValueError, KeyError, EOFError, AssertionError)
"""What reading a damaged file may raise, beside ``pickle.UnpicklingError``."""

_FORMAT_CLASSES = {
    "builtins": ("set", "frozenset", "slice"),
    "collections": ("OrderedDict", "defaultdict"),
    "pathlib": ("Path", "PosixPath"),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": (
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
}


class CheckpointSource(Protocol):
    """Where a checkpoint is, and how to say that something is wrong with it.

    Attributes:
        path: a ``--save`` directory, or one iteration in it.
    """

    @property
    def path(self) -> Path: ...

    def error(self, problem: str, remedy: str) -> RecipeError:
        """The error "<what the user wrote> problem; remedy"."""
        ...


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles what ``.metadata`` files are made of and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known = name in _FORMAT_CLASSES.get(module, ())
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not known and not dtype:
            raise pickle.UnpicklingError(f"refers to {module}.{name}, which is no part of it")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """The stock reader with the restricted unpickler."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / INDEX, "rb") as file:
            return _MetadataUnpickler(file).load()


_Places = tuple[int, dict[tuple[int, ...], list[ChunkStorageMetadata]]]


class Piece(NamedTuple):
    """A slice of a stored tensor and where it goes.

    Attributes:
        key: name of the stored tensor.
        global_shape: shape that the stored tensor must have.
        offset: where the slice begins in it.
        target: the slice's place in memory; leading axes of size 1 may be left out.
    """

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    target: torch.Tensor

    def view(self) -> torch.Tensor:
        """``target`` with as many axes as the stored tensor."""
        missing = len(self.global_shape) - self.target.dim()
        return self.target.detach().view((1,) * missing + tuple(self.target.shape))


class _Placer(DefaultLoadPlanner):
    """Hands the reader the place of each read item; the reader copies, casts and moves."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__()
        self._views = {(piece.key, tuple(piece.offset)): piece.view() for piece in pieces}
        self.objects: dict[str, io.BytesIO] = {}

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        index = read_item.dest_index
        assert index.offset is not None, "parts of tensors have a place"
        view = self._views[index.fqn, tuple(index.offset)]
        for axis, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            view = view.narrow(axis, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """The reader has copied into the place itself."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.objects[read_item.dest_index.fqn] = value


@dataclass
class TorchDistCheckpoint:
    """An opened checkpoint: what it holds, and tensor slices on demand.

    Attributes:
        source: what the user calls it.
        folder: the directory of the iteration.
        tensors: stored model tensors by name; optimizer and other training state is left out.
        metadata: which file holds which part of which tensor.
    """

    source: CheckpointSource
    folder: Path
    tensors: dict[str, TensorStorageMetadata]
    metadata: Metadata
    _reader: _Reader
    _places: dict[str, _Places] = field(default_factory=dict)

    @classmethod
    def open(cls, source: CheckpointSource) -> TorchDistCheckpoint:
        """Read the metadata, and check that the files are in the folder and whole.

        Raises:
            RecipeError: not a ``torch_dist`` checkpoint, or a damaged one.
        """
        folder = iteration_folder(source)
        _check_format(source, folder)
        reader = _Reader(str(folder))
        try:
            metadata = reader.read_metadata()
            reader.set_up_storage_reader(metadata, is_coordinator=False)
            stored = metadata.state_dict_metadata
        except (*DAMAGED, pickle.UnpicklingError, AttributeError, ImportError) as error:
            raise damaged(source, folder / INDEX, error) from error
        tensors = {
            key: value
            for key, value in stored.items()
            if isinstance(value, TensorStorageMetadata) and not _TRAINING_STATE.match(key)
        }
        checkpoint = cls(source, folder, tensors, metadata, reader)
        checkpoint._check_files()
        return checkpoint

    @property
    def args(self) -> Namespace:
        """Megatron's arguments of the run that wrote the checkpoint."""
        args = self.common.get("args")
        if not isinstance(args, Namespace):
            raise self.source.error(
                f"holds no Megatron arguments in {self.folder}",
                "only checkpoints that Megatron's training loop saved tell their architecture",
            )
        return args

    def read(self, pieces: Sequence[Piece]) -> None:
        """Copy slices of stored tensors into place, casting to the target's dtype and device.

        Each piece's name must be in ``tensors`` and its shape must agree. No collective.

        Raises:
            RecipeError: a file that cannot be read.
        """
        items: list[ReadItem] = []
        for piece in pieces:
            assert tuple(self.tensors[piece.key].size) == tuple(piece.global_shape), piece.key
            chunk = ChunkStorageMetadata(torch.Size(piece.offset), piece.view().shape)
            near = self._near(piece.key, chunk)
            items += create_read_items_for_chunk_list(piece.key, near, [chunk])
        with torch.no_grad():
            self._read_items(items, _Placer(pieces))

    def with_training_state(self) -> TorchDistCheckpoint:
        """The same with the optimizer's tensors, and other training state, among ``tensors``.

        Raises:
            RecipeError: a file of theirs is missing or too short.
        """
        tensors = {
            key: value
            for key, value in self.metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        checkpoint = dataclasses.replace(self, tensors=tensors, _places={})
        checkpoint._check_files()
        return checkpoint

    def _near(self, key: str, chunk: ChunkStorageMetadata) -> TensorStorageMetadata:
        """A stored tensor with those of its parts alone that can overlap a slice.

        Every part is compared with the slice behind this; layers and experts stacked in a tensor
        would make that the square of their number.
        """
        stored = self.tensors[key]
        if key not in self._places:
            self._places[key] = _by_place(stored)
        axes, by_place = self._places[key]
        if axes == 0 or any(size != 1 for size in chunk.sizes[:axes]):
            return stored
        return dataclasses.replace(stored, chunks=by_place.get(tuple(chunk.offsets[:axes]), []))

    def _read_items(self, items: list[ReadItem], placer: _Placer) -> None:
        try:
            self._reader.read_data(LoadPlan(items), placer).wait()
        except (*DAMAGED, pickle.UnpicklingError) as error:
            raise damaged(self.source, self.folder, error) from error

    def _check_files(self) -> None:
        """Files have plain names, and every part of the model lies within one that exists."""
        needed: dict[str, int] = {}
        for index, info in self.metadata.storage_data.items():
            name = getattr(info, "relative_path", None)
            place: list[Any] = [getattr(info, part, None) for part in ("offset", "length")]
            if not is_plain_name(name) or name == INDEX:
                raise self.source.error(
                    f"names a file {show(name)} in {INDEX}, which is none of its own",
                    "take the checkpoint from its source again",
                )
            if not all(type(number) is int and number >= 0 for number in place):
                where = f"{show(index.fqn)} is at {show(place)} of {name}"
                raise damaged(self.source, self.folder / INDEX, ValueError(where))
            if index.fqn in self.tensors or index.fqn == COMMON_OBJECT:
                needed[name] = max(sum(place), needed.get(name, 0))
        for name, end in needed.items():
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else None
            if size is None or size < end:
                actual = "it is not there" if size is None else f"it has {size}"
                raise self.source.error(
                    f"is incomplete: {path} must have {end} bytes, {actual}",
                    "copy the checkpoint again or name another iteration",
                )

    @functools.cached_property
    def common(self) -> dict[str, Any]:
        """What Megatron stores once for all ranks: ``args``, ``iteration``, and so on.

        Raises:
            RecipeError: it cannot be read.
        """
        import megatron.core  # noqa: F401  registers the classes that torch.load may restore

        path = self.folder / COMMON_FILE
        try:
            if path.is_file():
                return torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(
                self.metadata.state_dict_metadata.get(COMMON_OBJECT), BytesStorageMetadata
            ):
                return {}
            index = MetadataIndex(COMMON_OBJECT)
            zero = torch.Size((0,))
            item = ReadItem(LoadItemType.BYTE_IO, index, zero, index, zero, zero)
            placer = _Placer([])
            self._read_items([item], placer)
            return torch.load(placer.objects[COMMON_OBJECT], weights_only=True)[0]
        except RecipeError:
            raise
        except pickle.UnpicklingError as error:
            refused = re.search(r"global:? (?:GLOBAL )?([\w.]+)", str(error), re.IGNORECASE)
            raise self.source.error(
                "holds objects that this Megatron does not know as data: "
                f"{refused[1] if refused else _first_line(error)}",
                "load it with the Megatron version that saved it",
            ) from error
        except DAMAGED as error:
            raise damaged(self.source, path, error) from error

    def common_mentions(self, name: str) -> bool:
        """Whether the common state may hold something of this name, by its bytes alone: to read it
        takes Megatron's classes, and the time to import them.

        Raises:
            RecipeError: it cannot be read.
        """
        path = self.folder / COMMON_FILE
        info = self.metadata.storage_data.get(MetadataIndex(COMMON_OBJECT))
        try:
            if path.is_file():
                return name.encode() in path.read_bytes()
            if info is None:
                return False
            path = self.folder / info.relative_path
            with path.open("rb") as file:
                file.seek(info.offset)
                return name.encode() in file.read(info.length)
        except OSError as error:
            raise damaged(self.source, path, error) from error


def _by_place(stored: TensorStorageMetadata) -> _Places:
    """How many leading axes have parts of size 1 alone, and the parts by their indices on them."""
    axes = 0
    while axes < len(stored.size) and all(chunk.sizes[axes] == 1 for chunk in stored.chunks):
        axes += 1
    by_place: dict[tuple[int, ...], list[ChunkStorageMetadata]] = collections.defaultdict(list)
    for chunk in stored.chunks:
        by_place[tuple(chunk.offsets[:axes])].append(chunk)
    return axes, by_place


def read_metadata(folder: Path) -> Metadata:
    """Which file of a checkpoint's folder holds which part of which tensor.

    Raises:
        OSError, pickle.UnpicklingError: it cannot be read.
    """
    return _Reader(str(folder)).read_metadata()


def is_training_state(name: str) -> bool:
    """Whether a stored name is one of the optimizer's, say, and none of the model's."""
    return bool(_TRAINING_STATE.match(name))


def stored_shapes(folder: Path, part: str = "") -> dict[str, tuple[int, ...]]:
    """Shapes of the model's tensors in a checkpoint's folder with ``part`` in their names.

    Raises:
        OSError, pickle.UnpicklingError: it cannot be read.
    """
    return {
        name: tuple(value.size)
        for name, value in read_metadata(folder).state_dict_metadata.items()
        if part in name and not is_training_state(name) and isinstance(value, TensorStorageMetadata)
    }


def iteration_folder(source: CheckpointSource) -> Path:
    """The directory of the iteration that a ``--save`` directory points to, or itself."""
    root = source.path
    if (root / INDEX).is_file() or (root / "metadata.json").is_file():
        return root
    tracker = root / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        iterations = sorted(path.name for path in root.glob("iter_*") if path.is_dir())
        remedy = (
            f"name one of its iterations, such as {root / iterations[-1]}"
            if iterations
            else "name a directory given to Megatron's --save, or an iter_* directory in it"
        )
        raise source.error("has no latest_checkpointed_iteration.txt", remedy)
    text = tracker.read_bytes()[:80].decode(errors="replace").strip()
    if text != "release" and not re.fullmatch("[0-9]{1,12}", text):
        raise source.error(
            f"has an unreadable {tracker.name}: {text[:40]!r}", "name the iter_* directory itself"
        )
    folder = root / ("release" if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise source.error(
            f"points to {folder.name}, which is not there", "name an existing iter_* directory"
        )
    return folder


def _check_format(source: CheckpointSource, folder: Path) -> None:
    if any(folder.glob("mp_rank_*")):
        raise source.error(
            f"is a checkpoint in Megatron's old torch format ({folder.name}/mp_rank_*)",
            "convert it with Megatron's --ckpt-convert-format torch_dist",
        )
    config = folder / "metadata.json"
    try:
        backend = json.loads(config.read_text())["sharded_backend"]
    except FileNotFoundError:
        raise source.error(
            f"is no torch_dist checkpoint: {config} is not there",
            "save it with --ckpt-format torch_dist",
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(source, config, error) from error
    if backend != "torch_dist":
        raise source.error(
            f"is a checkpoint in format {backend!r}", "save it with --ckpt-format torch_dist"
        )
    if not (folder / INDEX).is_file():
        raise source.error(
            f"is incomplete: {folder / INDEX} is not there",
            "copy the checkpoint again or name another iteration",
        )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def damaged(source: CheckpointSource, path: Path, error: Exception) -> RecipeError:
    """The error for a file that cannot be read."""
    return source.error(
        f"cannot be read at {path}: {_first_line(error)}",
        "copy the checkpoint again or name another iteration",
    )
