"""The process that asks servers: ``python -m megatron_moe_inject.teachers.served.process``.

It is started by a rank that trains, has no torch, no CUDA and nothing of Megatron's, and ends when
that rank does, whose end closes its input. The API key comes by the environment.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import BinaryIO

from megatron_moe_inject.teachers.served.client import api_key
from megatron_moe_inject.teachers.served.pool import Pool
from megatron_moe_inject.teachers.served.protocols import Answer
from megatron_moe_inject.teachers.served.wire import (
    ANSWER,
    ASK,
    DROP,
    FAILED,
    NEED,
    REMARK,
    SETTINGS,
    Message,
    Settings,
    answer_bytes,
    receive,
    send,
    text_of,
)


class _Teller:
    """Writes messages, one at a time, from all threads."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def _send(self, message: Message, *more: bytes) -> None:
        with self._lock:
            try:
                send(self._stream, message, *more)
            except OSError:  # the rank has ended
                os._exit(0)

    def answered(self, number: int, answer: Answer) -> None:
        self._send(Message(ANSWER, number), *answer_bytes(answer))

    def failed(self, number: int, why: str) -> None:
        self._send(Message(FAILED, number, why.encode()))

    def remark(self, text: str) -> None:
        self._send(Message(REMARK, content=text.encode()))


def main() -> None:
    """Answer until the input ends."""
    # A terminal sends its interrupt to the whole group: the rank says when it is time.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    commands = sys.stdin.buffer
    # What a library prints must not stand between messages.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    first = receive(commands)
    if first is None:
        return
    assert first.kind == SETTINGS, first.kind
    settings, teller = Settings.unpacked(first.content), _Teller(answers)
    key = api_key(settings.key_from, "server.key_from")
    pool = Pool(settings, key, teller.answered, teller.failed, teller.remark)
    pool.start()
    while (message := receive(commands)) is not None:
        if message.kind == ASK:
            pool.ask(message.number, text_of(message.content))
        elif message.kind == NEED:
            pool.need(message.number)
        elif message.kind == DROP:
            pool.drop(message.number)
    os._exit(0)


if __name__ == "__main__":
    main()
