"""Deltas: what training changed in a student, as a folder the size of that.

A delta holds the new values of every slice that is not bitwise what it was in the base checkpoint:
an expert's matrix, a layer's norm, a whole embedding. It is a folder of safetensors files and one
``delta.json`` that names each slice, its file, and the checksum of what the base held there.
Applying it to the base gives back the trained weights bitwise, and to anything else is an error.
Both directions stream: memory is bounded by one file of the delta, whatever the student's size.

Only weights count. Optimizer, RNG and the projections of feature imitation stay behind.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_moe_inject.experts.freeze import is_own
from megatron_moe_inject.files import new_folder
from megatron_moe_inject.torch_dist import Piece, TorchDistCheckpoint, rewritten_copy
from megatron_moe_inject.typed import RecipeError, listing

FORMAT, VERSION = "megatron_moe_inject.delta", 1
INDEX = "delta.json"
_FILE_BYTES = 4 << 30

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
"""Wraps an iterable of known length to show how far it is, as ``tqdm`` does."""


def _silent(items: Iterable[Any], total: int) -> Iterable[Any]:
    return items


@dataclass(frozen=True)
class CheckpointPlace:
    """A checkpoint named on the command line; see ``torch_dist.CheckpointSource``."""

    flag: str
    path: Path

    def error(self, problem: str, remedy: str) -> RecipeError:
        """The error "--flag path problem; remedy"."""
        return RecipeError(f"{self.flag} {self.path} {problem}; {remedy}", self.flag)

    def open(self) -> TorchDistCheckpoint:
        """The checkpoint.

        Raises:
            RecipeError: it is not there, or no whole ``torch_dist`` checkpoint.
        """
        if not self.path.is_dir():
            raise self.error("is no directory", "name a directory given to Megatron's --save")
        return TorchDistCheckpoint.open(self)


@dataclass(frozen=True)
class DeltaSummary:
    """What a delta holds.

    Attributes:
        changed: slices by the name of their tensor.
        bytes: size of the values.
        base_bytes: size of all weights of the base.
    """

    changed: Mapping[str, int]
    bytes: int
    base_bytes: int


def stacked_axes(name: str) -> int:
    """Leading axes of a stored tensor that number layers and experts, not part of a weight.

    Megatron stacks ``decoder.layers.3.x`` of all layers as ``decoder.layers.x``, and experts as
    ``experts.experts.x``, unless the checkpoint says otherwise in the name.
    """
    layers = bool(re.search(r"(^|\.)layers\.(?!\d)", name))
    experts = bool(re.search(r"\.experts\.experts\.(?!\d)", name))
    return layers + experts


def export_delta(
    base: CheckpointPlace,
    trained: CheckpointPlace,
    output: Path,
    *,
    progress: Progress = _silent,
    file_bytes: int = _FILE_BYTES,
) -> DeltaSummary:
    """Compare two checkpoints of one model and write what differs. No collective.

    Args:
        base: before training.
        trained: after it, at any parallel layout.
        output: a folder that does not exist; it appears whole or not at all.
        progress: shows how far it is.
        file_bytes: largest size of one file, and of what is held in memory.

    Raises:
        RecipeError: a checkpoint that cannot be read, two that are not of one model, an output
            that exists, or nothing that changed.
    """
    _must_not_exist(output)
    before, after = base.open(), trained.open()
    names = _common_tensors(before, after)
    slices = [(name, place) for name in names for place in _places(before, name)]
    index: dict[str, Any] = {}
    with new_folder(output) as folder:
        batch: dict[str, torch.Tensor] = {}
        files = itertools.count(1)

        def flush() -> None:
            file = f"delta-{next(files):05d}.safetensors"
            save_file(batch, folder / file)
            for name in batch:
                index[name]["file"] = file
            batch.clear()

        size = 0
        for name, place in progress(slices, len(slices)):
            old, new = _read(before, name, place), _read(after, name, place)
            if torch.equal(_bytes(old), _bytes(new)):
                continue
            if batch and size + new.nbytes > file_bytes:
                flush()
                size = 0
            entry = "@".join([name, ".".join(map(str, place))]) if place else name
            index[entry] = {"tensor": name, "place": list(place), "base_sha256": _checksum(old)}
            batch[entry] = new
            size += new.nbytes
        if not index:
            raise trained.error("does not differ from the base", "name the checkpoint after it")
        flush()
        summary = _summary(before, index, folder)
        described = {
            "format": FORMAT,
            "version": VERSION,
            "model": _fingerprint(before),
            "base_iteration": before.folder.name,
            "trained_iteration": after.folder.name,
            "bytes": summary.bytes,
            "files": {path.name: _file_checksum(path) for path in sorted(folder.iterdir())},
            "slices": index,
        }
        (folder / INDEX).write_text(json.dumps(described, indent=1), encoding="utf-8")
    return summary


def apply_delta(
    base: CheckpointPlace, delta: Path, output: Path, *, progress: Progress = _silent
) -> DeltaSummary:
    """Write the base with a delta applied, as a checkpoint that Megatron loads. No collective.

    The result holds weights and arguments, no optimizer state: load it with ``--finetune``.

    Args:
        base: the checkpoint that the delta was made from.
        delta: what ``export_delta`` wrote.
        output: a ``--save`` directory that does not exist; it appears whole or not at all.
        progress: shows how far it is.

    Raises:
        RecipeError: a damaged delta, another base, or an output that exists.
    """
    _must_not_exist(output)
    described = _read_index(delta)
    before = base.open()
    if _fingerprint(before) != described["model"]:
        raise base.error("is another model than the delta's base", "name the base it was made from")
    index = described["slices"]
    for entry in progress(index.values(), len(index)):
        found = _checksum(_read(before, entry["tensor"], tuple(entry["place"])))
        if found != entry["base_sha256"]:
            raise base.error(
                f"holds other values of {entry['tensor']} {entry['place']} than the delta's base",
                "name the base it was made from",
            )
    changes: dict[str, dict[tuple[int, ...], Callable[[], torch.Tensor]]] = {}
    for name, entry in index.items():
        changes.setdefault(entry["tensor"], {})[tuple(entry["place"])] = _Stored(
            delta / entry["file"], name
        )
    with new_folder(output) as folder:
        number = re.fullmatch(r"iter_(\d{7,})", before.folder.name)
        name = before.folder.name if number else "release"
        rewritten_copy(before, folder / name, changes, progress)
        tracker = folder / "latest_checkpointed_iteration.txt"
        tracker.write_text(str(int(number[1])) if number else "release")
    counts = Counter(entry["tensor"] for entry in index.values())
    return DeltaSummary(counts, described["bytes"], _total_bytes(before))


@dataclass(frozen=True)
class _Stored:
    """One slice of a delta, read when it is called for."""

    path: Path
    name: str

    def __call__(self) -> torch.Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)


def _common_tensors(before: TorchDistCheckpoint, after: TorchDistCheckpoint) -> list[str]:
    own = {name for name in after.tensors if not is_own(name)}
    base = {name for name in before.tensors if not is_own(name)}
    if own != base:
        missing, more = sorted(base - own), sorted(own - base)
        parts = [f"lacks {listing(missing, 4)}"] if missing else []
        parts += [f"holds {listing(more, 4)} besides"] if more else []
        raise after.source.error(
            f"is another model than the base: it {' and '.join(parts)}",
            "compare two checkpoints of one model",
        )
    for name in base:
        old, new = before.tensors[name], after.tensors[name]
        kinds = old.properties.dtype, new.properties.dtype
        if old.size != new.size or kinds[0] != kinds[1]:
            raise after.source.error(
                f"has {name} as {list(new.size)} {kinds[1]}, the base as {list(old.size)} "
                f"{kinds[0]}",
                "compare two checkpoints of one model in one precision",
            )
    return sorted(base)


def _places(checkpoint: TorchDistCheckpoint, name: str) -> Iterator[tuple[int, ...]]:
    sizes = checkpoint.tensors[name].size[: stacked_axes(name)]
    return itertools.product(*(range(size) for size in sizes))


def _read(checkpoint: TorchDistCheckpoint, name: str, place: tuple[int, ...]) -> torch.Tensor:
    stored = checkpoint.tensors[name]
    rest = tuple(stored.size)[len(place) :]
    target = torch.empty(rest, dtype=stored.properties.dtype)
    offset = (*place, *(0 for _ in rest))
    checkpoint.read([Piece(name, tuple(stored.size), offset, target)])
    return target


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """So that NaN equals itself and 0.0 differs from -0.0."""
    return tensor.reshape(-1).view(torch.uint8)


def _checksum(tensor: torch.Tensor) -> str:
    return hashlib.sha256(_bytes(tensor).numpy()).hexdigest()


def _file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprint(checkpoint: TorchDistCheckpoint) -> str:
    """Names, shapes and types of all weights."""
    rows = sorted(
        (name, tuple(stored.size), str(stored.properties.dtype))
        for name, stored in checkpoint.tensors.items()
        if not is_own(name)
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _total_bytes(checkpoint: TorchDistCheckpoint) -> int:
    return sum(s.size.numel() * s.properties.dtype.itemsize for s in checkpoint.tensors.values())


def _summary(base: TorchDistCheckpoint, index: Mapping[str, Any], folder: Path) -> DeltaSummary:
    size = 0
    for entry in index.values():
        stored = base.tensors[entry["tensor"]]
        size += stored.size[len(entry["place"]) :].numel() * stored.properties.dtype.itemsize
    counts = Counter(entry["tensor"] for entry in index.values())
    return DeltaSummary(counts, size, _total_bytes(base))


def _read_index(delta: Path) -> dict[str, Any]:
    """The delta's description, checked against its files."""

    def damaged(problem: object) -> RecipeError:
        return RecipeError(f"--delta {delta} {problem}; copy or export it again", "--delta")

    path = delta / INDEX
    if not path.is_file():
        raise RecipeError(f"--delta {delta} holds no {INDEX}; name a folder of export-delta")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        kind = described["format"], described["version"]
        if kind != (FORMAT, VERSION):
            raise RecipeError(
                f"--delta {delta} is {kind[0]} version {kind[1]}; this reads {FORMAT} "
                f"version {VERSION}"
            )
        for name, checksum in described["files"].items():
            if _file_checksum(delta / name) != checksum:
                raise damaged(f"is damaged: {name} is not what was written")
        stored: set[str] = set()
        for name in described["files"]:
            with safe_open(delta / name, framework="pt") as file:
                stored |= set(file.keys())
        if stored != set(described["slices"]):
            raise damaged("does not hold the slices that it lists")
        return described
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, RecipeError):
            raise
        raise damaged(f"cannot be read ({type(error).__name__}: {error})") from error


def _must_not_exist(output: Path) -> None:
    if output.exists():
        raise RecipeError(f"--output {output} exists already; name another or remove it")
