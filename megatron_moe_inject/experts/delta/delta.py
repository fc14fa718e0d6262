"""Deltas: what training changed in a student, as a folder the size of that.

A delta holds the new values of every slice that is not bitwise what it was in the base checkpoint:
an expert's matrix, a layer's norm, a whole embedding. It is a folder of safetensors files and one
``delta.json`` that names each slice, its file, and the checksum of what the base held there.
Applying it to the base gives back the trained weights bitwise, and to anything else is an error.
Both directions stream: memory is bounded by one file of the delta, whatever the student's size.

Only weights count. Optimizer, RNG and the projections of feature imitation stay behind.

A delta may come from anybody: nothing in it is code, its files are plain names in its folder that
have a checksum, and what its slices are is held against the base before anything is written.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_moe_inject.experts.delta.weights import Weights, stacked_axes
from megatron_moe_inject.host import typed
from megatron_moe_inject.host.errors import (
    RecipeError,
    listing,
    one_line,
    show,
)
from megatron_moe_inject.host.files import is_plain_name, new_folder
from megatron_moe_inject.host.new_experts import card_in
from megatron_moe_inject.host.text import ranges
from megatron_moe_inject.host.torch_dist import TorchDistCheckpoint
from megatron_moe_inject.host.torch_dist_copy import rewritten_copy

FORMAT, VERSION = "megatron_moe_inject.delta", 1
INDEX = "delta.json"
_FILE_BYTES = 4 << 30

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
"""Wraps an iterable of known length to show how far it is, as ``tqdm`` does."""


def _silent(items: Iterable[Any], total: int) -> Iterable[Any]:
    return items


@dataclass(frozen=True)
class CheckpointPlace:
    """A checkpoint named on the command line; see ``host.torch_dist.CheckpointSource``."""

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


_NEEDED = {"remedy": "the index was changed"}


@dataclass(frozen=True)
class Slice:
    """One changed slice of a stored tensor.

    Attributes:
        tensor: name in the checkpoint.
        place: indices on its leading axes.
        base_sha256: of the bytes that the base holds there.
        file: of the delta, which holds the new values under the slice's own name.
    """

    tensor: str = field(metadata=_NEEDED)
    place: list[int] = field(metadata=_NEEDED)
    base_sha256: str = field(metadata=_NEEDED)
    file: str = field(metadata=_NEEDED)


@dataclass(frozen=True)
class DeltaIndex:
    """What ``delta.json`` says.

    Attributes:
        model: fingerprint of names, shapes and types of the base's weights.
        base_iteration, trained_iteration: folders that were compared.
        bytes: size of the values.
        layers: the layers of a hybrid base, one symbol each, which the slices' tensors number;
            ``None`` for a base that is a GPT model, and where one of both was.
        files: SHA-256 of each file, by name.
        slices: by their name in the files.
    """

    format: str = field(metadata=_NEEDED)
    version: int = field(metadata=_NEEDED)
    model: str = field(metadata=_NEEDED)
    base_iteration: str = field(metadata=_NEEDED)
    trained_iteration: str = field(metadata=_NEEDED)
    bytes: int = field(metadata=_NEEDED)
    files: dict[str, str] = field(metadata=_NEEDED)
    slices: dict[str, Slice] = field(metadata=_NEEDED)
    layers: str | None = None


class DeltaFolder:
    """A delta that was read, for others than ``apply_delta``.

    Args:
        path: what ``export_delta`` wrote.

    Attributes:
        index: its description, checked against its files.

    Raises:
        RecipeError: it is damaged, or no delta.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.index = _read_index(path)

    def error(self, problem: str, remedy: str) -> RecipeError:
        """The error "--delta path problem; remedy"."""
        return RecipeError(f"--delta {self._path} {problem}; {remedy}", "--delta")

    def read(self, name: str) -> torch.Tensor:
        """New values of a slice by its name in ``index.slices``."""
        with safe_open(self._path / self.index.slices[name].file, framework="pt") as file:
            return file.get_tensor(name)


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
    before, after = _of_one_kind(Weights(base.open()), Weights(trained.open()))
    before = before.named_like(after.tensors)
    after = after.named_like(before.tensors)
    names = _common_tensors(before, after)
    slices = [(name, place) for name in names for place in before.places(name)]
    index: dict[str, Slice] = {}
    with new_folder(output) as folder:
        batch: dict[str, torch.Tensor] = {}
        changed: dict[str, tuple[str, tuple[int, ...], str]] = {}
        files = itertools.count(1)

        def flush() -> None:
            file = f"delta-{next(files):05d}.safetensors"
            try:
                save_file(batch, folder / file)
            except SafetensorError as error:  # no space left, say
                raise OSError(str(error)) from error
            for name in batch:
                tensor, place, checksum = changed[name]
                index[name] = Slice(tensor, list(place), checksum, file)
            batch.clear()

        size = 0
        for name, place in progress(slices, len(slices)):
            old, new = before.read(name, place), after.read(name, place)
            if torch.equal(_bytes(old), _bytes(new)):
                continue
            if batch and size + new.nbytes > file_bytes:
                flush()
                size = 0
            entry = "@".join([name, ".".join(map(str, place))]) if place else name
            changed[entry] = name, place, slice_checksum(old)
            batch[entry] = new
            size += new.nbytes
        if not changed:
            raise trained.error("does not differ from the base", "name the checkpoint after it")
        flush()
        summary = _summary(before, index)
        described = DeltaIndex(
            format=FORMAT,
            version=VERSION,
            model=before.fingerprint(),
            base_iteration=before.checkpoint.folder.name,
            trained_iteration=after.checkpoint.folder.name,
            layers=before.layers,
            bytes=summary.bytes,
            files={path.name: _file_checksum(path) for path in sorted(folder.iterdir())},
            slices=index,
        )
        (folder / INDEX).write_text(json.dumps(asdict(described), indent=1), encoding="utf-8")
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
    before = _numbered(Weights(base.open()), described.layers)
    before = before.named_like({entry.tensor for entry in described.slices.values()})
    if before.fingerprint() != described.model:
        _refuse_new_experts(base, before.checkpoint)
        raise base.error("is another model than the delta's base", "name the base it was made from")
    index = described.slices
    changes = _changes(delta, index, before)
    for entry in progress(index.values(), len(index)):
        checksum = slice_checksum(before.read(entry.tensor, tuple(entry.place)))
        if checksum != entry.base_sha256:
            raise base.error(
                f"holds other values of {entry.tensor} {entry.place} than the delta's base",
                "name the base it was made from",
            )
    with new_folder(output) as folder:
        checkpoint = before.checkpoint
        number = re.fullmatch(r"iter_(\d{7,})", checkpoint.folder.name)
        name = checkpoint.folder.name if number else "release"
        rewritten_copy(checkpoint, folder / name, changes, progress)
        tracker = folder / "latest_checkpointed_iteration.txt"
        tracker.write_text(str(int(number[1])) if number else "release")
    return _summary(before, index)


def _refuse_new_experts(base: CheckpointPlace, checkpoint: TorchDistCheckpoint) -> None:
    """RecipeError where another model is the base with new experts, whose ids may have moved."""
    card = card_in(checkpoint.common.get("args"), str(checkpoint.folder))
    if card is not None:
        raise base.error(
            f"has new experts ({ranges(card.ids())} of {card.experts}), which the delta's base has "
            "not",
            f"apply it to {card.base}, and add the experts to the result",
        )


@dataclass(frozen=True)
class _Stored:
    """One slice of a delta, read when it is called for.

    Raises:
        RecipeError: it is not of the base's shape and type.
    """

    delta: Path
    file: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __call__(self) -> torch.Tensor:
        with safe_open(self.delta / self.file, framework="pt") as file:
            value = file.get_tensor(self.name)
        if (tuple(value.shape), value.dtype) != (self.shape, self.dtype):
            raise _damaged(
                self.delta,
                f"holds {show(self.name)} as {list(value.shape)} {value.dtype}, which the base has "
                f"as {list(self.shape)} {self.dtype}",
            )
        return value


def _of_one_kind(before: Weights, after: Weights) -> tuple[Weights, Weights]:
    """Both by the same names: where one is a hybrid model, by those of a GPT model."""
    if before.layers == after.layers:
        return before, after
    if before.layers is not None and after.layers is not None:
        raise after.error(
            f"has the layers {after.layers}, the base {before.layers}",
            "compare two checkpoints of one model",
        )
    problem = "is a hybrid model, and the other checkpoint a GPT model"
    return before.as_gpt(problem), after.as_gpt(problem)


def _numbered(base: Weights, layers: str | None) -> Weights:
    """The base by the names of a delta's slices."""
    if base.layers == layers:
        return base
    if layers is None:
        return base.as_gpt("is a hybrid model, and the delta's base was a GPT model")
    problem = "is a GPT model" if base.layers is None else f"has the layers {base.layers}"
    raise base.error(
        f"{problem}, and the delta's base the layers {layers}", "name the base it was made from"
    )


def _common_tensors(before: Weights, after: Weights) -> list[str]:
    base, after_names = before.tensors.keys(), after.tensors.keys()
    if after_names != base:
        missing, more = sorted(base - after_names), sorted(after_names - base)
        parts = [f"lacks {listing(missing, 4)}"] if missing else []
        parts += [f"holds {listing(more, 4)} besides"] if more else []
        raise after.error(
            f"is another model than the base: it {' and '.join(parts)}",
            "compare two checkpoints of one model",
        )
    for name in base:
        old, new = before.tensors[name], after.tensors[name]
        if old != new:
            raise after.error(
                f"has {name} as {list(new.size)} {new.dtype}, the base as {list(old.size)} "
                f"{old.dtype}",
                "compare two checkpoints of one model in one precision",
            )
    return sorted(base)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """So that NaN equals itself and 0.0 differs from -0.0."""
    return tensor.reshape(-1).view(torch.uint8)


def slice_checksum(tensor: torch.Tensor) -> str:
    """What ``Slice.base_sha256`` is of the base's values."""
    return hashlib.sha256(_bytes(tensor).numpy()).hexdigest()


def _file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _summary(base: Weights, index: Mapping[str, Slice]) -> DeltaSummary:
    size = 0
    for entry in index.values():
        stored = base.tensors[entry.tensor]
        size += math.prod(stored.size[len(entry.place) :]) * stored.dtype.itemsize
    whole = base.checkpoint.tensors.values()
    total = sum(s.size.numel() * s.properties.dtype.itemsize for s in whole)
    return DeltaSummary(Counter(entry.tensor for entry in index.values()), size, total)


def _damaged(delta: Path, problem: object) -> RecipeError:
    return RecipeError(f"--delta {delta} {problem}; copy or export it again", "--delta")


def _read_index(delta: Path) -> DeltaIndex:
    """The delta's description, checked against its files."""
    path = delta / INDEX
    if not path.is_file():
        raise RecipeError(f"--delta {delta} holds no {INDEX}; name a folder of export-delta")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        kind = plain["format"], plain["version"]
        if kind != (FORMAT, VERSION):
            raise RecipeError(
                f"--delta {delta} is {one_line(str(kind[0]))} version {show(kind[1])}; this reads "
                f"{FORMAT} "
                f"version {VERSION}"
            )
        try:
            described = typed.build(DeltaIndex, plain)
        except RecipeError as error:
            raise _damaged(delta, f"has an {INDEX} that cannot be: {error}") from None
        names = [*described.files, *(entry.file for entry in described.slices.values())]
        for name in names:
            if not is_plain_name(name) or name not in described.files:
                raise _damaged(delta, f"names a file {show(name)}, which is none of its own")
        stored: dict[str, str] = {}
        for name, checksum in described.files.items():
            if _file_checksum(delta / name) != checksum:
                raise _damaged(delta, f"is damaged: {name} is not what was written")
            with safe_open(delta / name, framework="pt") as file:
                stored |= dict.fromkeys(file.keys(), name)
        if stored != {name: entry.file for name, entry in described.slices.items()}:
            raise _damaged(delta, "does not hold the slices that it lists")
        return described
    except RecipeError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        problem = f"cannot be read ({type(error).__name__}: {error})"
        raise _damaged(delta, problem) from error


def _changes(
    delta: Path, index: Mapping[str, Slice], base: Weights
) -> dict[str, dict[tuple[int, ...], _Stored]]:
    """The new values by the base's own tensors and places; every slice must be one of its, once."""
    changes: dict[str, dict[tuple[int, ...], _Stored]] = {}
    for name, entry in index.items():
        place, stored = tuple(entry.place), base.tensors.get(entry.tensor)
        sizes = () if stored is None else stored.size[: stacked_axes(entry.tensor)]
        exists = len(place) == len(sizes) and all(map(operator.contains, map(range, sizes), place))
        if stored is None or not exists:
            raise _damaged(delta, f"has a slice {show(name)} that is none of the base's")
        shape = stored.size[len(place) :]
        new = _Stored(delta, entry.file, name, shape, stored.dtype)
        for tensor, own_place in base.places_of(entry.tensor, place):
            if own_place in changes.setdefault(tensor, {}):
                raise _damaged(delta, f"has a slice {show(name)} that is none of the base's")
            changes[tensor][own_place] = new
    return changes


def _must_not_exist(output: Path) -> None:
    if output.exists():
        raise RecipeError(f"--output {output} exists already; name another or remove it")
