"""One safetensors file, read by its header: names, types, shapes, and single tensors or slices.

Reads with plain reads at an offset and no memory map, so that what a process holds is what it asked
for. The header is held against the format's rules and the file's size when it is read, so that a
file that was cut off is known before anything is done with it. ``header_of`` makes a header.

The format: 8 bytes with the length of the header, the header in JSON, then the tensors' bytes
without gaps (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_moe_inject.host.errors import show

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types by the format's names."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
_LARGEST_HEADER = 100_000_000
_CHUNK = 16 << 20
_LFS_POINTER = b"version https://git-lfs"


class DamagedFileError(Exception):
    """A file that is not what it should be; ``problem`` follows its path, ``remedy`` what to do."""

    def __init__(self, problem: str, remedy: str = "copy it again from its source") -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: its own.
        dtype: of what is stored.
        shape: its sizes.
        begin: of its bytes, from the file's start.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def bytes(self) -> int:
        """How many it has."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class SafetensorsFile:
    """What the header of a file says.

    Attributes:
        path: the file.
        header: its first bytes as they are, to where the tensors begin.
        metadata: texts by name; ``None`` where the header has none.
        tensors: by name, in the header's order.
        size: of the whole file.
    """

    path: Path
    header: bytes
    metadata: Mapping[str, str] | None
    tensors: Mapping[str, StoredTensor]
    size: int

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Read and check the header.

        Raises:
            DamagedFileError: it breaks the format's rules, or does not fit the file's size.
            OSError: the file cannot be read.
        """
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if is_lfs_pointer(path):
                raise DamagedFileError(
                    "is a pointer of git-lfs and not the file itself", "run git lfs pull in it"
                )
            if len(start) < 8 or not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                raise DamagedFileError("is no whole safetensors file")
            text = file.read(length)
        header = _header_json(text)
        metadata = header.pop(METADATA, None)
        if metadata is not None and not _only_texts(metadata):
            raise DamagedFileError(f"has a damaged header ({METADATA} holds more than texts)")
        data = 8 + length
        tensors = {name: _stored(name, entry, data) for name, entry in header.items()}
        end = data
        for tensor in sorted(tensors.values(), key=lambda t: (t.begin, t.bytes)):
            if tensor.begin != end:
                raise DamagedFileError(f"has a damaged header ({show(tensor.name)} is misplaced)")
            end += tensor.bytes
        if end > size:
            raise DamagedFileError(f"is cut off: {size} of {end} bytes are there")
        if end < size:
            raise DamagedFileError(f"has {size - end} bytes more than its header tells of")
        return cls(path, start + text, metadata, tensors, size)

    def read(self, name: str, index: Sequence[int] = ()) -> torch.Tensor:
        """A tensor, or its slice at ``index`` on the leading axes, on the host.

        Raises:
            DamagedFileError: the file has become shorter.
            OSError: it cannot be read.
            IndexError: there is no such slice.
        """
        stored = self.tensors[name]
        place = 0
        for position, length in zip(index, stored.shape, strict=False):
            if not 0 <= position < length:
                raise IndexError(f"{name} {list(stored.shape)} has no {list(index)}")
            place = place * length + position
        shape = stored.shape[len(index) :]
        content = torch.empty(math.prod(shape) * stored.dtype.itemsize, dtype=torch.uint8)
        rest = memoryview(content.numpy())
        with self.path.open("rb", buffering=0) as file:
            file.seek(stored.begin + place * len(rest))
            while rest:
                rest = rest[_read_into(file, rest, name) :]
        return content.view(stored.dtype).view(shape)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """A tensor's bytes, some at a time; a chunk is good until the next one is asked for.

        Raises:
            DamagedFileError, OSError: as ``read``.
        """
        stored = self.tensors[name]
        chunk = memoryview(bytearray(min(stored.bytes, _CHUNK)))
        left = stored.bytes
        with self.path.open("rb", buffering=0) as file:
            file.seek(stored.begin)
            while left:
                got = _read_into(file, chunk[:left], name)
                yield chunk[:got]
                left -= got


def header_of(
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> tuple[bytes, dict[str, StoredTensor]]:
    """The first bytes of a file that holds these tensors, and where each of them stands.

    Their bytes come in the order of their element's size, largest first, so that each is aligned
    as the format wants it; among those alike, in the order given.
    """
    header: dict[str, Any] = {} if metadata is None else {METADATA: dict(metadata)}
    ordered = sorted(tensors, key=lambda tensor: -tensor[1].itemsize)
    end = 0
    begins = []
    for name, dtype, shape in ordered:
        begins.append(end)
        end += math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begins[-1], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    stored = {
        name: StoredTensor(name, dtype, tuple(shape), data + begin)
        for (name, dtype, shape), begin in zip(ordered, begins, strict=True)
    }
    return len(text).to_bytes(8, "little") + text, stored


def stored_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes as a file holds them."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def is_lfs_pointer(path: Path) -> bool:
    """Whether git put a small text there that stands for a large file."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def _read_into(file: io.RawIOBase, room: memoryview, name: str) -> int:
    got = file.readinto(room)
    if not got:
        raise DamagedFileError(f"ends within {name}")
    return got


def _header_json(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError("a name occurs twice")
        return content

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"has a damaged header ({error})") from None
    if not isinstance(header, dict):
        raise DamagedFileError("has a damaged header (it is no mapping)")
    return header


def _only_texts(metadata: object) -> bool:
    return isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())


def _stored(name: str, entry: Any, data: int) -> StoredTensor:
    try:
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise DamagedFileError(f"has a damaged header ({show(name)} is incomplete)")
    if kind not in DTYPES:
        raise DamagedFileError(
            f"holds {name} as {show(kind)}, which is not known here",
            "use the model in bfloat16, in FP8 by blocks or in MXFP4",
        )
    tensor = StoredTensor(name, DTYPES[kind], tuple(shape), data + begin)
    if tensor.bytes != end - begin:
        raise DamagedFileError(f"has a damaged header (the size of {show(name)} is not its own)")
    return tensor
