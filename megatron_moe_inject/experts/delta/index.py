"""What ``delta.json`` says, read and held against the delta's files.

A delta may come from anybody: nothing in it is code, its files are plain names in its folder that
have a checksum.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_moe_inject.host import typed
from megatron_moe_inject.host.errors import RecipeError, one_line, show
from megatron_moe_inject.host.files import is_plain_name
from megatron_moe_inject.host.new_experts import NewExperts
from megatron_moe_inject.host.stored_adapters import Base

FORMAT = "megatron_moe_inject.delta"
VERSION, WITH_ADAPTERS, WITH_NEW_EXPERTS = 1, 2, 3
"""Of an index with slices alone, with adapters, and with experts that the base has not."""
INDEX = "delta.json"

_NEEDED = {"remedy": "the index was changed"}


@dataclass(frozen=True)
class Slice:
    """One changed slice of a stored tensor.

    Attributes:
        tensor: name in the checkpoint.
        place: indices on its leading axes.
        base_sha256: of the bytes that the base holds there; empty of a new expert.
        file: of the delta, which holds the new values under the slice's own name.
    """

    tensor: str = field(metadata=_NEEDED)
    place: list[int] = field(metadata=_NEEDED)
    base_sha256: str = field(metadata=_NEEDED)
    file: str = field(metadata=_NEEDED)


@dataclass(frozen=True)
class Factors:
    """One low-rank change of a matrix, ``scale * b @ a``.

    Attributes:
        a, b: names in the files, of ``[r, in]`` and ``[out, r]``.
        scale: of their product.
        domain: whose tokens alone passed it; ``None`` = all.
    """

    a: str = field(metadata=_NEEDED)
    b: str = field(metadata=_NEEDED)
    scale: float = field(metadata=_NEEDED)
    domain: str | None = None


@dataclass(frozen=True)
class Adapted:
    """A matrix with adapters.

    Attributes:
        tensor, place, base_sha256: as of a ``Slice``.
        changes: which are added to what the base holds.
    """

    tensor: str = field(metadata=_NEEDED)
    place: list[int] = field(metadata=_NEEDED)
    base_sha256: str = field(metadata=_NEEDED)
    changes: list[Factors] = field(metadata=_NEEDED)


@dataclass(frozen=True)
class NewRows:
    """Rows that take the place of the base's in a vocabulary.

    Attributes:
        tensor: name in the checkpoint.
        base_sha256: of these rows in the base.
        rows: name in the files; row i is that of ``ids[i]``.
    """

    tensor: str = field(metadata=_NEEDED)
    base_sha256: str = field(metadata=_NEEDED)
    rows: str = field(metadata=_NEEDED)
    ids: list[int] = field(metadata=_NEEDED)


@dataclass(frozen=True)
class Adapters:
    """Adapters and vocabulary rows of a delta.

    Attributes:
        base: what their run loaded when they began.
        dtypes: types of the base's matrices, by tensor: ``bfloat16``.
        files: of their tensors, by name.
    """

    base: Base = field(metadata=_NEEDED)
    dtypes: dict[str, str] = field(metadata=_NEEDED)
    files: dict[str, str] = field(metadata=_NEEDED)
    matrices: list[Adapted] = field(metadata=_NEEDED)
    rows: list[NewRows] = field(metadata=_NEEDED)

    @property
    def domains(self) -> list[str]:
        """That have adapters of their own."""
        named = (change.domain for matrix in self.matrices for change in matrix.changes)
        return list(dict.fromkeys(name for name in named if name is not None))


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
        adapters: of a run that trained some.
        new_experts: the card of experts that the base has not; slices are then those of the model
            with them (``delta.grown``).
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
    adapters: Adapters | None = None
    new_experts: NewExperts | None = None

    @property
    def its_version(self) -> int:
        """The version that goes with what it holds."""
        if self.new_experts is not None:
            return WITH_NEW_EXPERTS
        return VERSION if self.adapters is None else WITH_ADAPTERS

    def text(self) -> str:
        """As it is stored: without new experts as before there were any."""
        plain = asdict(self)
        if self.new_experts is None:
            del plain["new_experts"]
        return json.dumps(plain, indent=1)

    def file_of(self) -> dict[str, str]:
        """The file of each tensor of the delta, by the tensor's name in it."""
        files = {name: entry.file for name, entry in self.slices.items()}
        return files if self.adapters is None else files | self.adapters.files


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """So that NaN equals itself and 0.0 differs from -0.0."""
    return tensor.reshape(-1).view(torch.uint8)


def slice_checksum(tensor: torch.Tensor) -> str:
    """What ``Slice.base_sha256`` is of the base's values."""
    return hashlib.sha256(as_bytes(tensor).numpy()).hexdigest()


def file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(delta: Path, problem: object) -> RecipeError:
    return RecipeError(f"--delta {delta} {problem}; copy or export it again", "--delta")


def read_index(delta: Path) -> DeltaIndex:
    """The delta's description, checked against its files."""
    path = delta / INDEX
    if not path.is_file():
        raise RecipeError(f"--delta {delta} holds no {INDEX}; name a folder of export-delta")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        kind = plain["format"], plain["version"]
        if kind not in [(FORMAT, v) for v in (VERSION, WITH_ADAPTERS, WITH_NEW_EXPERTS)]:
            raise RecipeError(
                f"--delta {delta} is {one_line(str(kind[0]))} version {show(kind[1])}; this reads "
                f"{FORMAT} versions {VERSION} to {WITH_NEW_EXPERTS}"
            )
        try:
            described = typed.build(DeltaIndex, plain)
            if described.new_experts is not None:
                described.new_experts.check()
        except RecipeError as error:
            raise damaged(delta, f"has an {INDEX} that cannot be: {error}") from None
        both = described.adapters is not None and described.new_experts is not None
        if described.its_version != kind[1] or both:
            raise damaged(delta, f"is of version {kind[1]} and holds what is not of that one")
        file_of = described.file_of()
        names = [*described.files, *file_of.values()]
        for name in names:
            if not is_plain_name(name) or name not in described.files:
                raise damaged(delta, f"names a file {show(name)}, which is none of its own")
        stored: dict[str, str] = {}
        for name, checksum in described.files.items():
            if file_checksum(delta / name) != checksum:
                raise damaged(delta, f"is damaged: {name} is not what was written")
            with safe_open(delta / name, framework="pt") as file:
                stored |= dict.fromkeys(file.keys(), name)
        adapters = described.adapters
        both = described.slices.keys() & (() if adapters is None else adapters.files.keys())
        if stored != file_of or both:
            raise damaged(delta, "does not hold the slices that it lists")
        return described
    except RecipeError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        problem = f"cannot be read ({type(error).__name__}: {error})"
        raise damaged(delta, problem) from error


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
        self.index = read_index(path)
        self._file_of = self.index.file_of()

    def error(self, problem: str, remedy: str) -> RecipeError:
        """The error "--delta path problem; remedy"."""
        return RecipeError(f"--delta {self._path} {problem}; {remedy}", "--delta")

    def damaged(self, problem: str) -> RecipeError:
        """The error for what does not fit in it."""
        return damaged(self._path, problem)

    def read(self, name: str) -> torch.Tensor:
        """A tensor by its name in the files: new values of a slice, a factor, rows."""
        with safe_open(self._path / self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)


@dataclass(frozen=True)
class StoredSlice:
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
            raise damaged(
                self.delta,
                f"holds {show(self.name)} as {list(value.shape)} {value.dtype}, which the base has "
                f"as {list(self.shape)} {self.dtype}",
            )
        return value
