"""A progress bar over the steps of a run that only records; off unless someone watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

from megatron_moe_inject.host.step import Step, StepPart


class StepProgress(StepPart):
    """Drawn on a terminal by the first rank, nowhere else.

    Args:
        rank: this process's.
        total: how many steps there will be, asked after each; ``None`` where it is not known.
        stream: where to draw; default standard error.
    """

    def __init__(
        self, rank: int, total: Callable[[], int | None], stream: TextIO | None = None
    ) -> None:
        self._total = total
        self._off = True if rank else None  # None asks tqdm whether the stream is a terminal
        self._stream = stream
        self._bar: tqdm | None = None

    def end(self, step: Step, reports: Any) -> None:
        """One more step is done."""
        if self._bar is None:
            self._bar = tqdm(
                total=self._total(),
                desc="profile",
                unit="step",
                disable=self._off,
                file=self._stream,
            )
        self._bar.update()

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.close()
