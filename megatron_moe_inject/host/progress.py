"""How far a run is: a bar on a terminal, a line at intervals in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from tqdm import tqdm

from megatron_moe_inject.host.step import Step, StepPart

_MOST_TERMS = 5


class StepProgress(StepPart):
    """Steps done, the time left, and the losses where they are told.

    Args:
        name: what is done, such as ``profile``.
        total: how many steps there will be, asked after the first; ``None`` where it is not known.
        training: whether steps that train are counted, or those that do not.
        interval: steps between the lines of a log; 0 where others are to write them
            (``say``), as Megatron does in training.
        stream: where to draw and write; default standard error for the bar, standard output for
            lines. Whether there is a bar is asked of standard error.
        clock: gives seconds.
    """

    def __init__(
        self,
        name: str,
        total: Callable[[], int | None],
        *,
        training: bool = False,
        interval: int = 1,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._total = total
        self._training = training
        self._interval = interval
        self._stream = stream
        self._clock = clock
        self._bar: tqdm | None = None
        self._draws = (stream or sys.stderr).isatty()
        self._done = 0
        self._first = 0.0

    def end(self, step: Step, reports: Any) -> None:
        """One more step is done."""
        if step.training != self._training:
            return
        self._done += 1
        if self._done == 1:
            self._first = self._clock()
            if self._draws:
                self._bar = tqdm(
                    total=self._total(), desc=self._name, unit="step", file=self._stream
                )
        if self._bar is not None:
            self._bar.update()
        elif self._interval and self._done % self._interval == 0:
            self.say({})

    def say(self, losses: Mapping[str, float]) -> None:
        """Show losses beside the bar, or write a line of the log.

        Args:
            losses: by name; terms of one domain or layer (``name/domain``) are left out.
        """
        texts = [f"{n} {value:.4g}" for n, value in losses.items() if "/" not in n][:_MOST_TERMS]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(texts))
            return
        total = self._total()
        done = f"{self._name}: step {self._done}" + ("" if total is None else f" of {total}")
        left = self._left(total)
        line = ", ".join([done, *([] if left is None else [f"{left} left"]), *texts])
        print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """A step ends by ``end``; nothing is to be closed after each."""

    def finish(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.close()

    def _left(self, total: int | None) -> str | None:
        """The time left by the mean of the steps after the first, which warms up."""
        if total is None or self._done < 2:
            return None
        seconds = (self._clock() - self._first) / (self._done - 1) * max(0, total - self._done)
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
