"""A folder of adapters: ``adapter_model.safetensors``, ``adapter_config.json``, and its base.

What a format puts into the files is planned by name and shape first; then one tensor at a time is
made and written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_moe_inject.convert.hf_folder import HfFolder
from megatron_moe_inject.host import typed
from megatron_moe_inject.host.errors import RecipeError, show_path
from megatron_moe_inject.host.files import new_folder
from megatron_moe_inject.host.safetensors_file import header_of, stored_bytes

WEIGHTS, CONFIG, BASE = "adapter_model.safetensors", "adapter_config.json", "base.json"
FORMAT, VERSION = "megatron_moe_inject.adapter_base", 1

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
_NEEDED = {"remedy": "export the adapters again"}


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written.

    Attributes:
        name, dtype, shape: of it.
        make: gives it.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class AdapterBase:
    """``base.json``: the model that the adapters belong to.

    Attributes:
        sha256: over name and stored bytes of all tensors of its folder.
        folder, checkpoint: where it was, and the checkpoint that training began from.
        consumer: whose names the adapters have.
    """

    format: str = field(metadata=_NEEDED)
    version: int = field(metadata=_NEEDED)
    sha256: str = field(metadata=_NEEDED)
    folder: str = field(metadata=_NEEDED)
    checkpoint: str = field(metadata=_NEEDED)
    consumer: str = field(metadata=_NEEDED)


def write_adapter_folder(
    output: Path,
    tensors: Sequence[Planned],
    config: Mapping[str, Any],
    base: AdapterBase,
    progress: Progress,
) -> int:
    """Write a folder; returns the bytes of its tensors. No collective.

    Args:
        output: must not exist; appears whole or not at all.
        tensors: in any order, names once each.
        config: of ``adapter_config.json``.
        base: what they belong to.
        progress: wraps the tensors to show how far it is.
    """
    header, places = header_of([(t.name, t.dtype, t.shape) for t in tensors], {"format": "pt"})
    assert len(places) == len(tensors), "a name is planned twice"
    by_name = {tensor.name: tensor for tensor in tensors}
    with new_folder(output) as folder:
        with (folder / WEIGHTS).open("wb") as file:
            file.write(header)
            for name in progress(list(places), len(places)):
                planned = by_name[name]
                value = planned.make()
                made, wanted = (value.dtype, tuple(value.shape)), (planned.dtype, planned.shape)
                assert made == wanted, (name, made, wanted)
                file.write(stored_bytes(value))
        _write_json(folder / CONFIG, config)
        _write_json(folder / BASE, asdict(base))
    return sum(tensor.bytes for tensor in places.values())


def folder_checksum(folder: HfFolder, progress: Progress) -> str:
    """SHA-256 over name and stored bytes of all tensors of a folder, whatever files hold them."""
    hasher = hashlib.sha256()
    names = sorted(folder.names)
    for name in progress(names, len(names)):
        for stored, tensor in sorted(folder.raw(name).items()):
            digest = hashlib.sha256(stored_bytes(tensor)).hexdigest()
            hasher.update(f"{stored}:{tensor.dtype}:{list(tensor.shape)}:{digest};".encode())
    return hasher.hexdigest()


def check_base(adapters: Path, folder: HfFolder, progress: Progress) -> AdapterBase:
    """That a folder of adapters belongs to a model; reads all of the model. No collective.

    Args:
        adapters: what ``write_adapter_folder`` wrote.
        folder: the model.

    Raises:
        RecipeError: it does not, or is no such folder.
    """
    base = read_base(adapters)
    if folder_checksum(folder, progress) != base.sha256:
        raise folder.error(
            f"is not the model that the adapters of {show_path(adapters)} were trained on",
            f"name that one; it was {show_path(base.folder)}",
        )
    return base


def read_base(adapters: Path) -> AdapterBase:
    """``base.json`` of a folder of adapters.

    Raises:
        RecipeError: there is none that can be read.
    """
    path = adapters / BASE
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(plain, dict) or (plain.get("format"), plain.get("version")) != (
            FORMAT,
            VERSION,
        ):
            raise ValueError(f"it is no {FORMAT} of version {VERSION}")
        return typed.build(AdapterBase, plain)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RecipeError(
            f"{show_path(adapters)} has no {BASE} that says which model its adapters belong to "
            f"({reason}); name a folder of moe-inject export-adapters"
        ) from None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
