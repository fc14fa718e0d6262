"""Real training runs that are alive at once and take their steps in turns.

So the noise of a machine hits all alike. Each arm is one or more processes of ``freeze_worker.py``,
with an open line on which it is told when it is its turn and answers what its step took.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from freeze_worker import SPECIFICATION

HERE = Path(__file__).parent


class Line:
    """The open line to one rank."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rw")

    def go(self) -> None:
        """Say that it is the rank's turn."""
        self._file.write("\n")
        self._file.flush()

    def hear(self, timeout: float) -> dict[str, Any]:
        """The rank's next answer; raises ``TimeoutError``, or ``ConnectionError`` at its end."""
        self._connection.settimeout(timeout)
        answer = self._file.readline()
        if not answer:
            raise ConnectionError
        return json.loads(answer)


@dataclass
class Running:
    """An arm at work.

    Attributes:
        lines: the open line to each rank.
        steps: the answers of all ranks, by step.
        ended: how it ended before its time, ``None`` while all is well.
        store: the ``TCPStore`` by which the ranks find each other, alive as long as this is.
    """

    processes: list[subprocess.Popen]
    logs: list[Path]
    lines: dict[int, Line] = field(default_factory=dict)
    steps: list[list[dict[str, Any]]] = field(default_factory=list)
    ended: str | None = None
    store: Any = None

    def begin(self, timeout: float) -> None:
        """Wait until every rank stands before its first step."""
        self._hear("at its start", timeout)

    def turn(self, timeout: float) -> None:
        """Let it take one step."""
        try:
            for line in self.lines.values():
                line.go()
        except OSError:
            self.stop(f"crashes after step {len(self.steps)}: {self.error()}")
            return
        answers = self._hear(f"in step {len(self.steps) + 1}", timeout)
        if answers:
            self.steps.append(answers)

    def _hear(self, when: str, timeout: float) -> list[dict[str, Any]]:
        """The answers of all ranks; sets ``ended`` where one is missing."""
        try:
            return [line.hear(timeout) for line in self.lines.values()]
        except TimeoutError:
            if all(process.poll() is None for process in self.processes):
                self.stop(f"hangs {when} (no answer for {timeout:g} s)")
                return []
        except OSError:
            pass  # a rank is gone
        self.stop(f"crashes {when}: {self.error()}")
        return []

    def error(self) -> str:
        """The last error in the logs."""
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        text = "\n".join(log.read_text(errors="replace") for log in self.logs)
        found = re.findall(r"^(?:\[rank\d+\]:\s*)?(\w[\w.]*(?:Error|Exception).*)$", text, re.M)
        return found[-1] if found else (text.strip().splitlines() or ["no output"])[-1]

    def stop(self, ended: str | None = None) -> None:
        """End its processes."""
        self.ended = self.ended or ended
        for process in self.processes:
            process.kill()
            process.wait()


def launch(
    spec: dict[str, Any], flags: Sequence[str], nproc: int, threads: int, folder: Path
) -> Running:
    """Start the processes of an arm; each tells ``spec["port"]`` who it is.

    Their store is this process's, as it is the agent's under ``torchrun``: a port that was only
    found free could be another's by the time a rank listens.
    """
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, logs = [], []
    for rank in range(nproc):
        environment = os.environ | {
            SPECIFICATION: json.dumps(spec),
            "OMP_NUM_THREADS": str(threads),
            "PYTHONWARNINGS": "ignore",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        logs.append(folder / f"{spec['arm']}-{rank}.log")
        command = [sys.executable, str(HERE / "freeze_worker.py"), *flags]
        with logs[-1].open("wb") as out:
            processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
    return Running(processes, logs, store=store)


def greet(listener: socket.socket, arms: dict[str, Running], timeout: float) -> None:
    """Connect every rank of every arm."""
    deadline = time.monotonic() + timeout
    for _ in range(sum(len(arm.processes) for arm in arms.values())):
        listener.settimeout(max(1.0, deadline - time.monotonic()))
        line = Line(listener.accept()[0])
        hello = line.hear(timeout)
        arms[hello["arm"]].lines[hello["rank"]] = line


def take_turns(
    start: Callable[[int], dict[str, Running]],
    steps: int,
    *,
    timeout: float,
    start_timeout: float,
    label: str,
) -> dict[str, Running]:
    """Run all arms for ``steps`` steps, one step of each at a time.

    Args:
        start: starts the arms, by name, given the port that they call.
        timeout: of one step, seconds.
        start_timeout: until the first step, seconds.
        label: begins the lines that tell how far it is.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        arms = start(listener.getsockname()[1])
        try:
            greet(listener, arms, start_timeout)
            for arm in arms.values():
                arm.begin(start_timeout)
            for number in range(steps):
                for arm in arms.values():
                    if arm.ended is None:
                        arm.turn(timeout)
                taken = [f"{name} {took(arm)}" for name, arm in arms.items()]
                print(f"{label}: step {number + 1}: {', '.join(taken)}", file=sys.stderr)
        finally:
            for arm in arms.values():
                arm.stop()
    return arms


def took(arm: Running) -> str:
    """Milliseconds of an arm's last step, of the rank that was the slowest."""
    if arm.ended:
        return "ended"
    return f"{max(answer['seconds'] for answer in arm.steps[-1]) * 1e3:.0f} ms"


def machine(options: argparse.Namespace) -> str:
    """Where it ran, in words."""
    import torch

    name = platform.machine()
    if options.cpu:
        models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = f"{os.cpu_count()} cores, {models[0] if models else name}"
    else:
        name = torch.cuda.get_device_name()
    return (
        f"{name}; {options.threads} thread(s) a process; Python {platform.python_version()}, "
        f"torch {torch.__version__}, Megatron-Core {importlib.metadata.version('megatron-core')}"
    )


def tell(
    script: str,
    options: argparse.Namespace,
    sizes: Iterable[str],
    rows: list[dict[str, Any]],
    render: Callable[[dict[str, Any]], list[str]],
) -> None:
    """Write what was measured to ``options.json``, where that is asked for, and print its table.

    Args:
        script: the benchmark, below this folder.
        sizes: names of the options that say how large everything is.
        render: makes lines of it.
    """
    result = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", f"examples/benchmarks/{script}", *sys.argv[1:]]),
        "machine": machine(options),
        "sizes": {name: getattr(options, name.replace("-", "_")) for name in sizes},
        "rows": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(render(result)), flush=True)
