"""Copies a Megatron ``torch_dist`` checkpoint on one rank, with some of its tensors changed."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import pickle
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_moe_inject.host.torch_dist import (
    COMMON_FILE,
    COMMON_OBJECT,
    DAMAGED,
    INDEX,
    TorchDistCheckpoint,
    damaged,
    is_training_state,
)

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
"""Wraps an iterable of known length to show how far it is, as ``tqdm`` does."""

Change = Callable[[tuple[int, ...], torch.Tensor], bool]
"""Changes a stored part of a tensor in place, given where it begins; says whether it did."""


def places_in(begin: tuple[int, ...], shape: Sequence[int], axes: int) -> Iterator[tuple[int, ...]]:
    """Indices on a tensor's leading axes of the slices that a part of it holds something of.

    Args:
        begin, shape: of the part.
        axes: how many lead.
    """
    leading = zip(begin[:axes], shape[:axes], strict=True)
    return itertools.product(*(range(b, b + size) for b, size in leading))


def replaced(slices: Mapping[tuple[int, ...], Callable[[], torch.Tensor]]) -> Change:
    """The change of a tensor that replaces slices, by index on its leading axes, with what is
    called for. All have the same number of indices."""
    (axes,) = {len(place) for place in slices}

    def change(begin: tuple[int, ...], part: torch.Tensor) -> bool:
        touched = False
        for place in places_in(begin, part.shape, axes):
            if place not in slices:
                continue
            rest = zip(begin[axes:], part.shape[axes:], strict=True)
            block = slices[place]()[tuple(slice(b, b + size) for b, size in rest)]
            part[tuple(i - b for i, b in zip(place, begin, strict=False))] = block
            touched = True
        return touched

    return change


def in_turn(changes: Sequence[Change]) -> Change:
    """Several changes of one tensor, one after the other."""

    def change(begin: tuple[int, ...], part: torch.Tensor) -> bool:
        touched = [each(begin, part) for each in changes]
        return any(touched)

    return change


def saved_copy(
    checkpoint: TorchDistCheckpoint,
    output: Path,
    changes: Mapping[str, Change],
    progress: Progress,
    **without: Any,
) -> None:
    """``rewritten_copy`` into a ``--save`` directory: of the same iteration, or a release.

    Args:
        output: the directory, which is there.
        without: see there.
    """
    number = re.fullmatch(r"iter_(\d{7,})", checkpoint.folder.name)
    name = checkpoint.folder.name if number else "release"
    rewritten_copy(checkpoint, output / name, changes, progress, **without)
    tracker = output / "latest_checkpointed_iteration.txt"
    tracker.write_text(str(int(number[1])) if number else "release")


def rewritten_copy(
    checkpoint: TorchDistCheckpoint,
    folder: Path,
    changes: Mapping[str, Change],
    progress: Progress,
    *,
    left_out: Callable[[str], bool] | None = None,
    common: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> None:
    """A copy of a checkpoint without its training state and with some tensors changed.

    What is stored stays as it is laid out; parts of tensors are read, changed and written one at a
    time.

    Args:
        checkpoint: the original.
        folder: where the copy goes; must not exist.
        changes: by tensor.
        progress: wraps the stored parts to show how far it is.
        left_out: whether a stored tensor or object of this name is not copied.
        common: what to store once for all ranks, made of a shallow copy of what was; default the
            same.

    Raises:
        RecipeError: parts that are stored transformed, or cannot be read, or a symbolic link: what
            it points to may be no part of the checkpoint.
    """
    metadata = copy.copy(checkpoint.metadata)
    parts = [
        (index, info)
        for index, info in metadata.storage_data.items()
        if index.fqn == COMMON_OBJECT
        or not (is_training_state(index.fqn) or (left_out and left_out(index.fqn)))
    ]
    parts.sort(key=lambda part: (part[1].relative_path, part[1].offset))
    parted = {info.relative_path for _, info in parts}
    others = [
        path
        for path in checkpoint.folder.iterdir()
        if path.name not in parted and path.name != INDEX and path.suffix != ".distcp"
    ]
    refuse_links(checkpoint, [checkpoint.folder / name for name in parted] + others)
    blobs: dict[str, bytes] = {}
    if common is not None:
        state = common(dict(checkpoint.common))
        blobs = {COMMON_OBJECT: _saved([state]), COMMON_FILE: _saved(state)}
    folder.mkdir(parents=True)
    storage: dict[MetadataIndex, Any] = {}
    for index, info in progress(parts, len(parts)):
        if getattr(info, "transform_descriptors", None):
            raise checkpoint.source.error(
                "stores its tensors transformed (compressed, say)", "save it without"
            )
        if index.fqn in blobs:
            blob = blobs[index.fqn]
        else:
            blob = _stored_bytes(checkpoint, info)
        if index.fqn in changes:
            blob = _changed(checkpoint, index, blob, changes[index.fqn])
        with (folder / info.relative_path).open("ab") as out:
            storage[index] = dataclasses.replace(info, offset=out.tell(), length=len(blob))
            out.write(blob)
    names = {index.fqn for index in storage}
    metadata.storage_data = storage
    metadata.state_dict_metadata = {
        name: value for name, value in metadata.state_dict_metadata.items() if name in names
    }
    metadata.planner_data = _only(metadata.planner_data, names)
    (folder / INDEX).write_bytes(pickle.dumps(metadata))
    for path in others:
        if path.name in blobs:
            (folder / path.name).write_bytes(blobs[path.name])
            continue
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)


def refuse_links(checkpoint: TorchDistCheckpoint, paths: Iterable[Path]) -> None:
    """Raises ``RecipeError`` for a symbolic link among paths or in folders among them: what it
    points to may be no part of the checkpoint."""
    for path in paths:
        inside = sorted(path.rglob("*")) if path.is_dir() and not path.is_symlink() else []
        for entry in (path, *inside):
            if entry.is_symlink():
                raise checkpoint.source.error(
                    f"holds {entry}, a symbolic link, which is not followed",
                    "copy the checkpoint with the files themselves (cp -rL)",
                )


def _stored_bytes(checkpoint: TorchDistCheckpoint, info: Any) -> bytes:
    path = checkpoint.folder / info.relative_path
    try:
        with path.open("rb") as file:
            file.seek(info.offset)
            return file.read(info.length)
    except OSError as error:
        raise damaged(checkpoint.source, path, error) from error


def _only(planner_data: Any, names: set[str]) -> Any:
    """A plan's paths for the names that are left."""
    if not isinstance(planner_data, dict):
        return planner_data
    return {name: value for name, value in planner_data.items() if name in names}


def _changed(
    checkpoint: TorchDistCheckpoint, index: MetadataIndex, blob: bytes, change: Change
) -> bytes:
    """A stored part of a tensor, changed."""
    try:
        part = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    except (*DAMAGED, pickle.UnpicklingError) as error:
        raise damaged(checkpoint.source, checkpoint.folder, error) from error
    assert index.offset is not None, "parts of tensors have a place"
    return _saved(part) if change(tuple(index.offset), part) else blob


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
