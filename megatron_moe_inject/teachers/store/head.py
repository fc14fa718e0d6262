"""The head of a store of states: ``head.safetensors``, the teacher's ``[v, h_t]`` once.

Beside it the header tells what makes logits of ``states @ head.T``. The manifest has the SHA-256 of
the whole file.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from megatron_moe_inject.host.errors import Failure
from megatron_moe_inject.host.files import replace_file
from megatron_moe_inject.host.safetensors_file import (
    DamagedFileError,
    SafetensorsFile,
    header_of,
    stored_bytes,
)
from megatron_moe_inject.losses.spec import LogitTransform

HEAD = "head.safetensors"
_NAME = "head"


def write_head(folder: Path, head: Tensor, transform: LogitTransform) -> None:
    """Write a head ``[v, h_t]``, as a whole or not at all.

    Raises:
        RecipeError: the file cannot be written.
    """
    softcap = "" if transform.softcap is None else repr(transform.softcap)
    metadata = {"scale": repr(transform.scale), "softcap": softcap}
    header, _ = header_of([(_NAME, head.dtype, tuple(head.shape))], metadata)
    replace_file(folder / HEAD, header + bytes(stored_bytes(head)))


def read_head(
    folder: Path,
    sha256: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    rows: slice,
    failure: Failure,
) -> tuple[Tensor, LogitTransform]:
    """Some rows of a store's head, zeros from v on, on the host, and what makes logits of it.

    Args:
        folder: of the store.
        sha256: what the manifest says of the file.
        shape: ``[v, h_t]``.
        dtype: of the head.
        rows: which; with both ends.
        failure: makes errors.

    Raises:
        RecipeError: the file is not there, damaged, or another one.
    """
    path = folder / HEAD
    try:
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest != sha256:
            raise DamagedFileError("is not the file that the manifest names", "copy it again")
        file = SafetensorsFile.open(path)
        stored = file.tensors.get(_NAME)
        if stored is None or (stored.shape, stored.dtype) != (shape, dtype):
            raise DamagedFileError("is no head of such states", "write the store again")
        found = torch.zeros(rows.stop - rows.start, shape[1], dtype=dtype)
        last = min(rows.stop, shape[0])
        if last > rows.start:
            found[: last - rows.start] = file.read(_NAME)[rows.start : last]
        metadata = file.metadata or {}
        softcap = metadata["softcap"]
        transform = LogitTransform(float(metadata["scale"]), float(softcap) if softcap else None)
    except DamagedFileError as error:
        raise failure(f"has {HEAD}, which {error.problem}", error.remedy) from None
    except (KeyError, ValueError) as error:
        raise failure(f"has {HEAD}, whose header is damaged ({error})", "copy it again") from None
    except OSError as error:
        problem = f"has {HEAD}, which cannot be read ({error.strerror})"
        raise failure(problem, "copy it again") from None
    return found, transform
