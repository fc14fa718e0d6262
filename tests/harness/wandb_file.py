"""What the real ``wandb`` wrote in offline mode: values by step and name.

Its file is a LevelDB log (blocks of 32 KiB; records of checksum, length and type) of protobuf
messages behind a header of 7 bytes. The package that reads it back has gone from its releases.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

_BLOCK = 32768
_HEADER = 7


def logged(folder: Path) -> dict[int, dict[str, float]]:
    """Numbers of the one offline run under ``folder``, by step, then name."""
    from wandb.proto import wandb_internal_pb2

    (path,) = Path(folder).glob("wandb/offline-run-*/*.wandb")
    steps: dict[int, dict[str, float]] = {}
    for message in _messages(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
        if record.WhichOneof("record_type") != "history":
            continue
        values = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        steps.setdefault(int(values.get("_step", record.history.step.num)), {}).update(values)
    return steps


def _messages(content: bytes) -> Iterator[bytes]:
    assert content[:4] == b":W&B"
    position, parts = _HEADER, []
    while position + _HEADER <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        position += _HEADER
        parts.append(content[position : position + length])
        position += length
        if kind in (1, 4):  # whole, or the last of several parts
            yield b"".join(parts)
            parts = []
