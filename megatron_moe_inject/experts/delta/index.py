"""What ``delta.json`` says, read and held against the delta's files.

A delta may come from anybody: nothing in it is code, its files are plain names in its folder that
have a checksum.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_moe_inject.host import typed
from megatron_moe_inject.host.errors import RecipeError, one_line, show
from megatron_moe_inject.host.files import is_plain_name

FORMAT, VERSION = "megatron_moe_inject.delta", 1
INDEX = "delta.json"

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
        if kind != (FORMAT, VERSION):
            raise RecipeError(
                f"--delta {delta} is {one_line(str(kind[0]))} version {show(kind[1])}; this reads "
                f"{FORMAT} "
                f"version {VERSION}"
            )
        try:
            described = typed.build(DeltaIndex, plain)
        except RecipeError as error:
            raise damaged(delta, f"has an {INDEX} that cannot be: {error}") from None
        names = [*described.files, *(entry.file for entry in described.slices.values())]
        for name in names:
            if not is_plain_name(name) or name not in described.files:
                raise damaged(delta, f"names a file {show(name)}, which is none of its own")
        stored: dict[str, str] = {}
        for name, checksum in described.files.items():
            if file_checksum(delta / name) != checksum:
                raise damaged(delta, f"is damaged: {name} is not what was written")
            with safe_open(delta / name, framework="pt") as file:
                stored |= dict.fromkeys(file.keys(), name)
        if stored != {name: entry.file for name, entry in described.slices.items()}:
            raise damaged(delta, "does not hold the slices that it lists")
        return described
    except RecipeError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        problem = f"cannot be read ({type(error).__name__}: {error})"
        raise damaged(delta, problem) from error
