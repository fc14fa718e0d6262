"""The training process's side of the one that asks servers: texts out, answers in.

Answers are known by what was asked, the ids of the text. So asking ahead is a hint and no more: an
answer that was fetched ahead in vain is let go, and a text that nobody asked for ahead is asked for
when it is needed, and counted. Nothing here knows steps or samples. A thread takes answers in as
they come, so that none waits in a pipe. No torch.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

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
    answer_of,
    receive,
    send,
    text_bytes,
)

_RESTARTS = 3
_MARGIN = 300.0
"""Seconds that the other process may be late."""
_MODULE = "megatron_moe_inject.teachers.served.process"


class ServerFailure(Exception):
    """No server says what is needed; the message names them and what each said last."""


@dataclass
class Counts:
    """What happened since it was read last.

    Attributes:
        texts: that were needed.
        missed: of these, those that had not been asked for ahead.
        waited: seconds that the caller waited.
    """

    texts: int = 0
    missed: int = 0
    waited: float = 0.0


class Answers:
    """Asks servers by a process of its own.

    Args:
        settings: how.
        remark: is told what a log should say.
    """

    def __init__(self, settings: Settings, remark: Callable[[str], None]) -> None:
        self._settings = settings
        self._remark = remark
        self._changed = threading.Condition()
        self._numbers: dict[bytes, int] = {}  # of texts that are asked for
        self._texts: dict[int, bytes] = {}
        self._needed: set[int] = set()
        self._answers: dict[bytes, Answer] = {}
        self._failures: dict[bytes, str] = {}
        self._wanted: Counter[bytes] = Counter()  # how often each will be taken
        self._last: dict[bytes, Answer] = {}  # what was taken last, for a step that runs again
        self._next_number = 0
        self._starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = ""
        self.counts = Counts()

    @property
    def ready(self) -> int:
        """Texts that are answered and not taken yet."""
        return len(self._answers)

    def hint(self, texts: Sequence[np.ndarray]) -> None:
        """Ask for texts [t] that will be needed. Does not wait for answers."""
        with self._changed:
            for tokens in texts:
                key = text_bytes(tokens)
                self._wanted[key] += 1
                self._ask(key)

    def fetch(self, texts: Sequence[np.ndarray]) -> list[Answer]:
        """What is said of texts [t], in order. Waits for what is not there yet.

        Raises:
            ServerFailure: nothing will be said of one.
        """
        begin = time.monotonic()
        keys = [text_bytes(tokens) for tokens in texts]
        with self._changed:
            if not set(keys) <= set(self._last):  # else the same step once more
                self._last = self._taken(Counter(keys))
            answers = [self._last[key] for key in keys]
        self.counts.texts += len(texts)
        self.counts.waited += time.monotonic() - begin
        return answers

    def _taken(self, keys: Counter[bytes]) -> dict[bytes, Answer]:
        """The answers to some texts, each as often as it is taken."""
        for key, often in keys.items():
            self.counts.missed += max(0, often - self._wanted[key])
            self._wanted[key] = max(often, self._wanted[key])
            self._failures.pop(key, None)  # it may be answered by now
            self._ask(key)
            if key in self._numbers:
                self._need(self._numbers[key])
        for key in keys:
            self._wait_for(key)
        answers = {key: self._answers[key] for key in keys}
        for key, often in keys.items():
            self._let_go(key, often)
        return answers

    def forget(self, texts: Sequence[np.ndarray]) -> None:
        """Let go of texts that were hinted at and will not be taken."""
        with self._changed:
            for tokens in texts:
                self._let_go(text_bytes(tokens), 1)

    def _let_go(self, key: bytes, often: int) -> None:
        self._wanted[key] -= often
        if self._wanted[key] > 0:
            return
        del self._wanted[key]
        self._answers.pop(key, None)
        self._failures.pop(key, None)
        number = self._numbers.pop(key, None)
        if number is not None:
            self._texts.pop(number)
            self._needed.discard(number)
            self._send(Message(DROP, number))

    def close(self) -> None:
        """End the process."""
        with self._changed:
            process, self._process = self._process, None
            self._starts = _RESTARTS + 1
        if process is not None:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _wait_for(self, key: bytes) -> None:
        # The other process gives up in time. Should it hang, nobody would say so.
        settings = self._settings
        until = time.monotonic() + settings.patience + 2 * settings.timeout + _MARGIN
        while key not in self._answers:
            if key in self._failures:
                raise ServerFailure(self._failures[key])
            if self._ended:
                raise ServerFailure(self._ended)
            if not self._changed.wait(until - time.monotonic()):
                raise ServerFailure("the process that asks the servers says nothing")

    def _ask(self, key: bytes) -> None:
        if key in self._numbers or key in self._answers or key in self._failures:
            return
        self._next_number += 1
        self._numbers[key], self._texts[self._next_number] = self._next_number, key
        if self._process is None:
            self._start()
        else:
            self._send(Message(ASK, self._next_number, key))

    def _need(self, number: int) -> None:
        if number not in self._needed:
            self._needed.add(number)
            self._send(Message(NEED, number))

    def _start(self) -> None:
        """Start the process, with all that is asked for so far."""
        if self._starts > _RESTARTS:
            return
        self._starts += 1
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
        )
        self._send(Message(SETTINGS, content=self._settings.packed()))
        for number, key in list(self._texts.items()):
            self._send(Message(ASK, number, key))
            if number in self._needed:
                self._send(Message(NEED, number))
        threading.Thread(target=self._take_in, args=(self._process,), daemon=True).start()

    def _send(self, message: Message) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            # Its end is seen, and dealt with, where its answers are read.
            with contextlib.suppress(OSError):
                send(self._process.stdin, message)

    def _take_in(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        while (message := receive(process.stdout)) is not None:
            if message.kind == REMARK:
                self._remark(message.content.decode())
                continue
            with self._changed:
                key = self._texts.pop(message.number, None)
                if key is None:  # nobody wants it any more
                    continue
                self._numbers.pop(key)
                self._needed.discard(message.number)
                if message.kind == ANSWER:
                    self._answers[key] = answer_of(message.content, self._settings.top + 1)
                elif message.kind == FAILED:
                    self._failures[key] = message.content.decode()
                self._changed.notify_all()
        code = process.wait()
        with self._changed:
            if process is not self._process:  # it was told to end
                return
            self._process = None
            told = f"the process that asks the servers ended (exit code {code})"
            if self._starts > _RESTARTS:
                self._ended = f"{told} for the {self._starts}th time"
            else:
                self._remark(f"{told}; it is started again")
                self._start()
            self._changed.notify_all()


def _environment() -> dict[str, str]:
    """That of this process, by which the other finds this package and no GPU."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
