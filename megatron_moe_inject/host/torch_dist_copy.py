"""Copies a Megatron ``torch_dist`` checkpoint on one rank, with some slices of it replaced."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_moe_inject.host.torch_dist import (
    COMMON_OBJECT,
    DAMAGED,
    INDEX,
    TorchDistCheckpoint,
    damaged,
    is_training_state,
)


def rewritten_copy(
    checkpoint: TorchDistCheckpoint,
    folder: Path,
    changes: Mapping[str, Mapping[tuple[int, ...], Callable[[], torch.Tensor]]],
    progress: Callable[[Iterable[Any], int], Iterable[Any]],
) -> None:
    """A copy of a checkpoint without its training state and with some slices replaced.

    What is stored stays as it is laid out; parts of tensors are read, changed and written one at a
    time.

    Args:
        checkpoint: the original.
        folder: where the copy goes; must not exist.
        changes: by tensor and index on its leading axes, what gives the new values.
        progress: wraps the stored parts to show how far it is.

    Raises:
        RecipeError: parts that are stored transformed, or cannot be read, or a symbolic link: what
            it points to may be no part of the checkpoint.
    """
    metadata = copy.copy(checkpoint.metadata)
    parts = [
        (index, info)
        for index, info in metadata.storage_data.items()
        if index.fqn == COMMON_OBJECT or not is_training_state(index.fqn)
    ]
    parts.sort(key=lambda part: (part[1].relative_path, part[1].offset))
    parted = {info.relative_path for _, info in parts}
    others = [
        path
        for path in checkpoint.folder.iterdir()
        if path.name not in parted and path.name != INDEX and path.suffix != ".distcp"
    ]
    refuse_links(checkpoint, [checkpoint.folder / name for name in parted] + others)
    folder.mkdir(parents=True)
    storage: dict[MetadataIndex, Any] = {}
    for index, info in progress(parts, len(parts)):
        if getattr(info, "transform_descriptors", None):
            raise checkpoint.source.error(
                "stores its tensors transformed (compressed, say)", "save it without"
            )
        blob = _stored_bytes(checkpoint, info)
        if index.fqn in changes:
            blob = _with_changes(checkpoint, index, blob, changes[index.fqn])
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


def _with_changes(
    checkpoint: TorchDistCheckpoint,
    index: MetadataIndex,
    blob: bytes,
    changes: Mapping[tuple[int, ...], Callable[[], torch.Tensor]],
) -> bytes:
    """A stored part of a tensor, with the slices that lie in it replaced."""
    try:
        part = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    except (*DAMAGED, pickle.UnpicklingError) as error:
        raise damaged(checkpoint.source, checkpoint.folder, error) from error
    assert index.offset is not None, "parts of tensors have a place"
    begin = tuple(index.offset)
    touched = False
    for place, new in changes.items():
        inside = tuple(i - b for i, b in zip(place, begin, strict=False))
        if not all(0 <= i < size for i, size in zip(inside, part.shape, strict=False)):
            continue
        rest = zip(begin[len(place) :], part.shape[len(place) :], strict=True)
        part[inside] = new()[tuple(slice(b, b + size) for b, size in rest)]
        touched = True
    if not touched:
        return blob
    stream = io.BytesIO()
    torch.save(part, stream)
    return stream.getvalue()
