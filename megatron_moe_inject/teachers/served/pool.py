"""Asks several servers at once for what they say of texts, and deals with those that fail.

Each server has some threads, which take texts from one queue: those that a step waits for first,
the others in the order in which they were asked for. So a server that is faster answers more, and
the work of one that is gone is done by the others. What happens when a text is not answered:

| what | then |
|---|---|
| no connection, no answer in time, HTTP 408, 429 or 5xx | the server is left alone for 0.5 s, then twice as long each time, 30 s at most, each within a third at random, or as long as it says; the text goes back to the queue |
| a server answers again | it first says anew what it says of a short text: another model is left out for good |
| HTTP 401, 403, 404, a redirect, a certificate that is not trusted | the server is left out for good |
| HTTP 400 and the like | the text is not asked for there again |
| no JSON, an answer about another text, too few ids, NaN | the text is asked for again, four times in all |
| a step has waited for the text longer than the patience, no server is left, or one of the last two lines is used up | the text has failed, with what each server said last |

Nothing that was only asked for ahead fails for want of time.
"""  # noqa: E501

from __future__ import annotations

import heapq
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megatron_moe_inject.teachers.served.address import Address
from megatron_moe_inject.teachers.served.client import Connection, Fault
from megatron_moe_inject.teachers.served.protocols import PROTOCOLS, Answer, BadAnswer
from megatron_moe_inject.teachers.served.wire import Settings

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
_BAD_ANSWERS = 4
SAME_MODEL = 0.25
"""Nats by which what a model says of one text may differ in the mean from one request to another.
Other batches round otherwise; another model is another model."""


@dataclass
class _Text:
    """A text that waits for an answer."""

    number: int
    tokens: np.ndarray
    needed_since: float | None = None
    bad_answers: int = 0
    refused_by: set[Address] = field(default_factory=set)
    said: dict[Address, str] = field(default_factory=dict)
    asked: bool = False


@dataclass
class _Server:
    """What is known of a server."""

    address: Address
    failures: int = 0
    free_from: float = 0.0
    left_out: str | None = None
    to_be_known: bool = False


class Pool:
    """Asks servers.

    Args:
        settings: which, and how.
        key: the API key.
        answered: is told the number of a text and its answer, from any thread.
        failed: is told the number of a text and why, from any thread.
        remark: is told what a log should say, from any thread.
    """

    def __init__(
        self,
        settings: Settings,
        key: str | None,
        answered: Callable[[int, Answer], None],
        failed: Callable[[int, str], None],
        remark: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._key = key
        self._protocol = PROTOCOLS[settings.protocol]
        self._answered, self._failed, self._remark = answered, failed, remark
        self._texts: dict[int, _Text] = {}
        self._queue: list[tuple[int, int]] = []
        self._changed = threading.Condition()
        self._servers = [_Server(address) for address in settings.addresses]
        self._open = True

    def start(self) -> None:
        """Start the threads."""
        for server in self._servers:
            for _ in range(self._settings.concurrent):
                threading.Thread(target=self._work, args=(server,), daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    def ask(self, number: int, tokens: np.ndarray) -> None:
        """Queue a text [t]."""
        with self._changed:
            self._texts[number] = _Text(number, tokens)
            heapq.heappush(self._queue, (1, number))
            self._changed.notify_all()

    def need(self, number: int) -> None:
        """A step waits for a text."""
        with self._changed:
            text = self._texts.get(number)
            if text is not None and text.needed_since is None:
                text.needed_since = time.monotonic()
                heapq.heappush(self._queue, (0, number))
                self._changed.notify_all()

    def drop(self, number: int) -> None:
        """Nobody wants a text any more."""
        with self._changed:
            self._texts.pop(number, None)

    def close(self) -> None:
        """Let the threads end."""
        with self._changed:
            self._open = False
            self._changed.notify_all()

    def _work(self, server: _Server) -> None:
        connection = Connection(server.address, self._settings.timeout, self._key)
        while (text := self._next(server)) is not None:
            try:
                self._check_model(server, connection)
                answer = self._say(connection, text.tokens)
            except Fault as fault:
                self._after_fault(server, text, fault)
            except BadAnswer as bad:
                self._after_bad_answer(server, text, str(bad))
            else:
                self._after_answer(server, text, answer)

    def _say(self, connection: Connection, tokens: np.ndarray) -> Answer:
        settings, protocol = self._settings, self._protocol
        request = protocol.request(tokens, settings.top, settings.model)
        return protocol.answer(connection.post(protocol.path, request), tokens, settings.top)

    def _next(self, server: _Server) -> _Text | None:
        """The next text for a server, when it may be asked; None when all is over."""
        with self._changed:
            while self._open and server.left_out is None:
                pause = server.free_from - time.monotonic()
                text = None if pause > 0 else self._take(server)
                if text is not None:
                    return text
                self._changed.wait(pause if pause > 0 else None)
        return None

    def _take(self, server: _Server) -> _Text | None:
        passed_over = []
        found = None
        while self._queue and found is None:
            place = heapq.heappop(self._queue)
            text = self._texts.get(place[1])
            if text is None or text.asked:  # dropped, or in the queue twice
                continue
            if server.address in text.refused_by:
                passed_over.append(place)
                continue
            text.asked, found = True, text
        for place in passed_over:
            heapq.heappush(self._queue, place)
        return found

    def _check_model(self, server: _Server, connection: Connection) -> None:
        """Of a server that was gone: it must say what it said when the run began."""
        if not server.to_be_known or not self._settings.probe:
            return
        tokens = np.array(self._settings.probe, np.int32)
        found = log_probs_of_text(self._say(connection, tokens), tokens)
        gap = mean_gap(found, np.array(self._settings.probe_log_probs, np.float32))
        if gap > SAME_MODEL:
            raise Fault(
                f"came back with another model (a text's log-probabilities are {gap:.2f} nats from "
                "those when the run began)",
                lasting=True,
            )
        server.to_be_known = False

    def _after_answer(self, server: _Server, text: _Text, answer: Answer) -> None:
        with self._changed:
            if server.failures:
                self._remark(f"{server.address} answers again")
            server.failures = 0
            wanted = self._texts.pop(text.number, None) is not None
        if wanted:
            self._answered(text.number, answer)

    def _after_fault(self, server: _Server, text: _Text, fault: Fault) -> None:
        with self._changed:
            text.said[server.address] = str(fault)
            if fault.lasting:
                if server.left_out is None:
                    server.left_out = str(fault)
                    self._remark(f"{server.address} {fault}; it is asked no more")
            elif fault.of_text:
                text.refused_by.add(server.address)
            else:
                self._pause(server, fault)
            self._give_back(text)

    def _pause(self, server: _Server, fault: Fault) -> None:
        """Leave a server alone for a while; requests that fail together count once."""
        now = time.monotonic()
        server.to_be_known = True
        if now < server.free_from:
            return
        if server.failures == 0:
            self._remark(f"{server.address} {fault}; it is asked again later")
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0**server.failures)
        pause = max(pause * random.uniform(2 / 3, 4 / 3), fault.wait)
        server.failures = min(server.failures + 1, 30)
        server.free_from = now + pause

    def _after_bad_answer(self, server: _Server, text: _Text, problem: str) -> None:
        with self._changed:
            text.said[server.address] = f"sent an answer that {problem}"
            text.bad_answers += 1
            if text.bad_answers == 1:
                self._remark(f"{server.address} {text.said[server.address]}; it is asked again")
            self._give_back(text)

    def _give_back(self, text: _Text) -> None:
        text.asked = False
        heapq.heappush(self._queue, (1 if text.needed_since is None else 0, text.number))
        self._fail_if_hopeless(text, time.monotonic())
        self._changed.notify_all()

    def _fail_if_hopeless(self, text: _Text, now: float) -> None:
        left = [s for s in self._servers if s.left_out is None]
        hopeless = not [s for s in left if s.address not in text.refused_by]
        hopeless |= text.bad_answers >= _BAD_ANSWERS
        if text.needed_since is not None and not text.asked:
            hopeless |= now - text.needed_since > self._settings.patience
        if not hopeless or self._texts.pop(text.number, None) is None:
            return
        for server in self._servers:
            if server.left_out is not None:
                text.said.setdefault(server.address, server.left_out)
        told = "; ".join(f"{address} {said}" for address, said in text.said.items())
        self._failed(text.number, told or "no server was free in time")

    def _watch(self) -> None:
        """Let texts fail whose time is up while no server takes them."""
        while self._open:
            time.sleep(min(1.0, self._settings.patience / 10))
            with self._changed:
                now = time.monotonic()
                for text in list(self._texts.values()):
                    if not text.asked:
                        self._fail_if_hopeless(text, now)


def log_probs_of_text(answer: Answer, tokens: np.ndarray) -> np.ndarray:
    """Log-probability [t - 1] of each id of a text [t] but the first; every answer has them."""
    own = answer.ids == tokens[1:, None]
    # An id whose probability is 0 has no place in an answer.
    return np.where(own, answer.log_probs, -np.inf).max(1)


def mean_gap(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean distance of log-probabilities, of which -50 stands for all that are less."""
    return float(np.abs(np.maximum(found, -50) - np.maximum(expected, -50)).mean())
