"""A progress bar over the steps of a run that only records; off unless someone watches."""

from __future__ import annotations

from typing import TextIO

from tqdm import tqdm


class StepProgress:
    """Drawn on a terminal by the first rank, nowhere else.

    Args:
        rank: this process's.
        stream: where to draw; default standard error.
    """

    def __init__(self, rank: int, stream: TextIO | None = None) -> None:
        self._off = True if rank else None  # None asks tqdm whether the stream is a terminal
        self._stream = stream
        self._bar: tqdm | None = None

    def step(self, total: int | None) -> None:
        """One more of ``total`` steps is done; None where their number is not known."""
        if self._bar is None:
            self._bar = tqdm(
                total=total, desc="profile", unit="step", disable=self._off, file=self._stream
            )
        self._bar.update()

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.close()
