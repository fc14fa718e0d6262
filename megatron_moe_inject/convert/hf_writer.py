"""A Hugging Face folder written anew with some values changed, one tensor in memory.

The new folder has the files of the one it is made from: the same names, the same tensors in the
same places, the same header bytes. What is not given anew is copied as it is stored, so that a
folder in which nothing changed is the same bit for bit. What is quantised is encoded again where it
changed (``published``), or, where the quantisation is dropped, everything is written decoded, under
headers of its own and without ``quantization_config``.

Weights in another form than the model's own files (``consolidated.safetensors``, ``*.bin``) would
be the old ones and are left out.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_moe_inject.convert.hf_folder import CONFIG, HfFolder
from megatron_moe_inject.convert.published import Quantised
from megatron_moe_inject.host.errors import RecipeError, show_path
from megatron_moe_inject.host.files import new_folder, require_room
from megatron_moe_inject.host.safetensors_file import (
    SafetensorsFile,
    StoredTensor,
    header_of,
    stored_bytes,
)
from megatron_moe_inject.host.safetensors_folder import INDEX, read_json

Quantized = Literal["keep", "drop"]
Values = Callable[[str], torch.Tensor | None]
Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class Outcome:
    """What became of a logical tensor.

    Attributes:
        storage: how it is stored in the new folder: "plain", "fp8", "mxfp4".
        changed: whether new values were given.
        elements: values in it.
        largest: the largest difference between what was given and what the new folder says, over
            the largest magnitude given.
        mean: the sum of those differences over the sum of magnitudes.
    """

    storage: str
    changed: bool
    elements: int
    largest: float = 0.0
    mean: float = 0.0


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        tensors: by logical name.
        bytes: size of the weights.
        left_out: files of the folder that hold weights in another form and were not copied.
    """

    tensors: Mapping[str, Outcome]
    bytes: int
    left_out: tuple[Path, ...]


def write_like(
    folder: HfFolder,
    output: Path,
    values: Values,
    *,
    quantized: Quantized = "keep",
    origin: str = "--output",
    beside: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write a folder like another one with some values changed.

    Args:
        folder: the other one.
        output: must not exist; nothing is left of it where something goes wrong.
        values: gives the new values of a logical tensor, in its shape and any floating type, or
            ``None`` where they are the old ones; asked once for each name.
        quantized: "keep" what is quantised so, or "drop" the quantisation: such tensors are
            written in their logical type.
        origin: the flag that names ``output``, for messages.
        beside: further files, by name.
        progress: wraps the names to show how far it is.

    Raises:
        RecipeError: it exists, there is no room, the disk is full, a file of the folder cannot be
            read, or new values that have another shape or cannot be stored.
    """
    if os.path.lexists(output):
        raise RecipeError(
            f"{origin}: {show_path(output)} is there already; name a new folder", origin
        )
    plans = {name: _plan(folder, file, quantized) for name, file in folder.files.files.items()}
    plans = {name: plan for name, plan in plans.items() if plan.tensors}
    kept, left_out = folder.plain_files()
    sizes = [plan.size for plan in plans.values()]
    require_room(output, sum(sizes) + sum((folder.path / p).stat().st_size for p in kept), origin)
    tensors: dict[str, Outcome] = {}
    with new_folder(output) as part:
        for name, plan in plans.items():
            with (part / name).open("wb") as out:
                out.write(plan.header)
                out.truncate(plan.size)
        places = {t.name: (part / n, t) for n, plan in plans.items() for t in plan.tensors.values()}
        names = progress(folder.names, len(folder.names)) if progress else folder.names
        for name in names:
            tensors[name] = _write_tensor(folder, name, values(name), places)
        for path in kept:
            (part / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder.path / path, part / path)
        _write_config(folder, part, quantized)
        _write_index(folder, part, plans)
        for name, content in (beside or {}).items():
            (part / name).write_bytes(content)
    return Written(tensors, sum(sizes), tuple(left_out))


@dataclass(frozen=True)
class _Plan:
    """A file to be written: its first bytes, and where each tensor stands in it."""

    header: bytes
    tensors: Mapping[str, StoredTensor]
    size: int


def _plan(folder: HfFolder, file: SafetensorsFile, quantized: Quantized) -> _Plan:
    wanted = []
    for stored in file.tensors.values():
        name, ending = folder.logical(stored.name)
        storage = folder.storage_of(name)
        if quantized == "keep" or storage.kind == "plain":
            wanted.append((stored.name, stored.dtype, stored.shape))
        elif ending == storage.endings[0]:
            wanted.append((name, folder.dtype(name), folder.shape(name)))
    if [name for name, *_ in wanted] == list(file.tensors) and all(
        file.tensors[name].dtype == dtype for name, dtype, _ in wanted
    ):
        return _Plan(file.header, file.tensors, file.size)
    header, tensors = header_of(wanted, file.metadata)
    return _Plan(header, tensors, len(header) + sum(t.bytes for t in tensors.values()))


def _write_tensor(
    folder: HfFolder,
    name: str,
    value: torch.Tensor | None,
    places: Mapping[str, tuple[Path, StoredTensor]],
) -> Outcome:
    storage = folder.storage_of(name)
    stored = {name + ending: folder.files.stored(name + ending) for ending in storage.endings}
    as_before = all(
        at in places and places[at][1].dtype == tensor.dtype for at, tensor in stored.items()
    )
    kind = storage.kind if as_before else "plain"
    elements = math.prod(folder.shape(name))
    if value is None:
        if as_before:
            for at in stored:
                _write(folder.files.chunks(at), *places[at])
        else:
            _write([stored_bytes(folder.read(name))], *places[name])
        return Outcome(kind, False, elements)
    _check_value(folder, name, value, kind)
    if kind == "plain":
        new = value.to(folder.dtype(name))
        _write([stored_bytes(new)], *places[name])
        parts = iter(_parts(new, value.ndim > 2))
    else:
        assert isinstance(storage, Quantised)
        pieces = storage.encode(value, folder.pieces(name))
        for ending, piece in pieces.items():
            _write([stored_bytes(piece)], *places[name + ending])
        split = zip(*(_parts(piece, value.ndim > 2) for piece in pieces.values()), strict=True)
        parts = (storage.decode(dict(zip(pieces, p, strict=True)), torch.float32) for p in split)
    return Outcome(kind, True, elements, *_rounding(value, parts))


def _check_value(folder: HfFolder, name: str, value: torch.Tensor, kind: str) -> None:
    shape = folder.shape(name)
    if tuple(value.shape) != shape:
        raise folder.error(
            f"holds {name} as {list(shape)}, the new values are {list(value.shape)}",
            "name the folder that this model was made from",
        )
    if kind != "plain" and not torch.isfinite(value).all():
        raise folder.error(
            f"keeps {name} in {kind.upper()}, and the new values are not all finite",
            "export an undamaged checkpoint",
        )


def _rounding(value: torch.Tensor, new: Iterable[torch.Tensor]) -> tuple[float, float]:
    """Largest and mean difference to ``new``, which comes in parts, relative to the largest
    magnitude and to the sum of them."""
    largest = difference = top = total = 0.0
    for one, other in zip(_parts(value, value.ndim > 2), new, strict=True):
        off, size = (one.float() - other.float()).abs(), one.float().abs()
        largest, top = max(largest, off.max().item()), max(top, size.max().item())
        difference, total = difference + off.sum().item(), total + size.sum().item()
    return (largest / top, difference / total) if top else (0.0, 0.0)


def _parts(tensor: torch.Tensor, stacked: bool) -> tuple[torch.Tensor, ...]:
    """By its first axis where matrices are stacked there, so that a part is one expert's."""
    if not tensor.numel():
        return ()
    return tensor.unbind() if stacked else (tensor,)


def _write(content: Iterable[memoryview], path: Path, place: StoredTensor) -> None:
    with path.open("r+b", buffering=0) as out:
        out.seek(place.begin)
        for rest in content:
            while rest:
                rest = rest[out.write(rest) :]


def _write_config(folder: HfFolder, part: Path, quantized: Quantized) -> None:
    dropped = {"quantization_config"} if quantized == "drop" else set()
    config = {key: value for key, value in folder.json.items() if key not in dropped}
    if config == read_json(folder.path, CONFIG, folder.error):
        shutil.copyfile(folder.path / CONFIG, part / CONFIG)
        return
    (part / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _write_index(folder: HfFolder, part: Path, plans: Mapping[str, _Plan]) -> None:
    """The folder's own index where it still tells the truth."""
    if not (folder.path / INDEX).exists():
        return
    index = read_json(folder.path, INDEX, folder.error)
    total = sum(t.bytes for plan in plans.values() for t in plan.tensors.values())
    files = {t: name for name, plan in plans.items() for t in plan.tensors}
    if index["weight_map"] == files and all(
        plans.get(n) == _Plan(f.header, f.tensors, f.size) for n, f in folder.files.files.items()
    ):
        shutil.copyfile(folder.path / INDEX, part / INDEX)
        return
    metadata = {**(index.get("metadata") or {}), "total_size": total}
    content = {**index, "metadata": metadata, "weight_map": dict(sorted(files.items()))}
    (part / INDEX).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
