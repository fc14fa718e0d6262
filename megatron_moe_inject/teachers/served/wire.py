"""What the training process and the one that asks servers say to each other, over pipes.

A message is a head (what it is, the number of a text, and the bytes that follow) and its content.
Numbers are sent as they are in memory. No torch: the process that asks has none.

Shapes: t ids of a text, k asked for.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import IO, NamedTuple

import numpy as np

from megatron_moe_inject.teachers.served.address import Address
from megatron_moe_inject.teachers.served.protocols import Answer

_HEAD = struct.Struct("<cQQ")
SETTINGS, ASK, NEED, DROP = b"s", b"a", b"n", b"d"
"""To the process: how to ask; a text; a step waits for it; nobody wants it any more."""
ANSWER, FAILED, REMARK = b"A", b"F", b"R"
"""From it: what was said of a text; why nothing will be; what a log should tell."""


@dataclass(frozen=True)
class Settings:
    """How servers are asked, in plain values.

    Attributes:
        addresses: of the servers.
        protocol: a key of ``protocols.PROTOCOLS``.
        model: its name there.
        top, timeout, patience, concurrent: see ``recipe.server.ServerSpec``.
        key_from: name of the variable; the key itself is sent nowhere.
        probe: a text by which a server that comes back is known.
        probe_log_probs: what was said of its ids when the run began.
    """

    addresses: tuple[Address, ...]
    protocol: str
    model: str
    top: int
    timeout: float
    patience: float
    concurrent: int
    key_from: str | None = None
    probe: tuple[int, ...] = ()
    probe_log_probs: tuple[float, ...] = ()

    def packed(self) -> bytes:
        """As one message."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def unpacked(cls, content: bytes) -> Settings:
        """Of ``packed``."""
        values = json.loads(content)
        values["addresses"] = tuple(Address(**address) for address in values["addresses"])
        for name in ("probe", "probe_log_probs"):
            values[name] = tuple(values[name])
        return cls(**values)


class Message(NamedTuple):
    """One message.

    Attributes:
        kind: one of the constants above.
        number: of the text it is about.
        content: what follows the head.
    """

    kind: bytes
    number: int = 0
    content: bytes = b""


def send(stream: IO[bytes], message: Message, *more: bytes) -> None:
    """Write one message, with more content behind it.

    Raises:
        OSError: nobody reads.
    """
    size = len(message.content) + sum(map(len, more))
    stream.write(_HEAD.pack(message.kind, message.number, size) + message.content)
    for part in more:
        stream.write(part)
    stream.flush()


def receive(stream: IO[bytes]) -> Message | None:
    """Read one message; None where the other side has ended."""
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    kind, number, size = _HEAD.unpack(head)
    content = stream.read(size)
    return Message(kind, number, content) if len(content) == size else None


def text_bytes(tokens: np.ndarray | Sequence[int]) -> bytes:
    """A text [t] as content, which also tells one from another."""
    return np.ascontiguousarray(tokens, np.int32).tobytes()


def text_of(content: bytes) -> np.ndarray:
    """Of ``text_bytes``, [t] int32."""
    return np.frombuffer(content, np.int32)


def answer_bytes(answer: Answer) -> tuple[bytes, bytes]:
    """An answer as content."""
    return answer.ids.tobytes(), answer.log_probs.tobytes()


def answer_of(content: bytes, slots: int) -> Answer:
    """Of ``answer_bytes`` with k + 1 ``slots``."""
    half = len(content) // 2
    ids = np.frombuffer(content, np.int32, half // 4).reshape(-1, slots)
    log_probs = np.frombuffer(content, np.float32, offset=half).reshape(-1, slots)
    return Answer(ids, log_probs)
