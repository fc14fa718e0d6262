"""Processes of the example: what each has spent, while it runs and when it has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from runner import QUIET

_PAUSE = 0.5
_TICKS = os.sysconf("SC_CLK_TCK")
_PARENT, _TIMES = 1, slice(11, 15)
"""Fields behind the name in ``/proc/PID/stat``: the parent, and ticks of a process and of its
children that have ended."""


class Process:
    """A program with its log, in a session of its own.

    Args:
        log: gets everything that it prints.
        command: of it; what begins with a dash is for this Python.
        environment: added to this process's.
    """

    def __init__(self, log: Path, *command: str, environment: dict[str, str] | None = None) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, *command] if command[0].startswith("-") else list(command)
        with log.open("w") as output:
            self._process = subprocess.Popen(
                words, stdout=output, stderr=output, start_new_session=True,
                env=os.environ | QUIET | (environment or {}),
            )  # fmt: skip
        self._seconds = 0.0

    def seconds(self) -> float:
        """Processor seconds of it and all that it started, so far."""
        children: dict[int, list[int]] = {}
        ticks: dict[int, int] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:  # has ended meanwhile
                continue
            own = int(path.parent.name)
            children.setdefault(int(fields[_PARENT]), []).append(own)
            ticks[own] = sum(map(int, fields[_TIMES]))
        total, found = 0, [self._process.pid]
        while found:
            own = found.pop()
            total += ticks.get(own, 0)
            found += children.get(own, ())
        self._seconds = max(self._seconds, total / _TICKS)
        return self._seconds

    def running(self) -> bool:
        """Whether it has not ended; raises ``SystemExit`` with the end of its log if it failed."""
        self.seconds()
        found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            time.sleep(_PAUSE)
            return True
        self.seconds()  # an ended process still has its times, until it is waited for
        if self._process.wait():
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
            raise SystemExit(f"{tail}\nfailed; the whole log is {self.log}")
        return False

    def until(self, text: str) -> float:
        """Processor seconds when its log has a text, or when it has ended."""
        while self.running() and text not in self.log.read_text(errors="replace"):
            pass
        return self._seconds

    def end(self) -> float:
        """Processor seconds when it has ended by itself."""
        while self.running():
            pass
        return self._seconds

    def stop(self) -> None:
        """End it now."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
