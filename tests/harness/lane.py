"""Harness: real Megatron training runs on the CPU lane, as child processes, with their numbers.

run = lane.run(lane.moe("--sequence-parallel", tp=2, ep=2), nproc=2)
run.losses("lm loss")        # one exact float per iteration
run.iterations[0]            # everything of the first iteration, grad norm included
run.evaluations, run.output, run.returncode
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import random
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.harness import zygote
from tests.harness.runner import PREFIX

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ("-m", "megatron_moe_inject.pretrain")
HARNESS = Path(__file__).parent
MINIMAL_GPT = (str(HARNESS / "minimal_gpt.py"),)

MODEL = shlex.split(
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 "
    "--seq-length 32 --max-position-embeddings 32 --position-embedding-type rope "
    "--normalization RMSNorm --swiglu --disable-bias-linear --attention-dropout 0 "
    "--hidden-dropout 0 --untie-embeddings-and-output-weights --use-cpu-initialization "
    "--make-vocab-size-divisible-by 32"
)
DATA = shlex.split("--mock-data --tokenizer-type NullTokenizer --vocab-size 127 --num-workers 0")
TRAIN = shlex.split(
    "--micro-batch-size 2 --global-batch-size 8 --train-iters 3 --lr 1e-3 --log-interval 1 "
    "--eval-iters 1 --eval-interval 1000"
)
ONE_BATCH = ("--micro-batch-size", "8")
"""A step's eight samples in one micro-batch on one process: for runs of many steps of which only
what they learn matters."""
MOE = shlex.split(
    "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01"
)
DEEPSEEK_ROUTER = shlex.split(
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-num-groups 2 "
    "--moe-router-group-topk 1 --moe-router-topk-scaling-factor 2.5 --moe-router-dtype fp32 "
    "--moe-shared-expert-intermediate-size 32"
)
DISTRIBUTED_OPTIMIZER = shlex.split(
    "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
)


@dataclass
class Run:
    """What a training run did."""

    returncode: int
    output: str
    iterations: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def losses(self, name: str = "lm loss") -> list[float | None]:
        """One value per iteration of a loss, ``grad norm``, or any number of Megatron's log.

        A class without a token in an iteration has None; a name that no iteration has is an error.
        """
        found = [iteration.get(name) for iteration in self.iterations]
        if not any(value is not None for value in found):
            raise KeyError(name)
        return found

    def tail(self, lines: int = 60) -> str:
        """The end of the output, for failure messages."""
        return "\n".join(self.output.splitlines()[-lines:])


def layout(tp: int = 1, pp: int = 1, ep: int = 1, cp: int = 1) -> list[str]:
    """Flags of a parallel layout; sequence parallelism and expert TP 1 where TP needs them."""
    flags = [
        *("--tensor-model-parallel-size", str(tp)),
        *("--pipeline-model-parallel-size", str(pp)),
        *("--context-parallel-size", str(cp)),
    ]
    if tp > 1:
        flags += ["--sequence-parallel"]
    if ep > 1:
        flags += ["--expert-model-parallel-size", str(ep), "--expert-tensor-parallel-size", "1"]
    return flags


def dense(*extra: str, tp: int = 1, pp: int = 1, cp: int = 1) -> list[str]:
    """A tiny dense GPT on mock data, three iterations; later flags override earlier ones."""
    return [*MODEL, *DATA, *TRAIN, *layout(tp, pp, 1, cp), *extra]


def moe(*extra: str, tp: int = 1, pp: int = 1, ep: int = 1, cp: int = 1) -> list[str]:
    """A tiny mixture of four experts on mock data; later flags override earlier ones."""
    return [*MODEL, *DATA, *TRAIN, *MOE, *layout(tp, pp, ep, cp), *extra]


def free_port() -> int:
    """A TCP port that nobody listens on now.

    Below those that Linux gives to whoever asks for any: another process may start to use one of
    these before the run does that it was found for.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def run(
    flags: Sequence[str],
    *,
    nproc: int = 1,
    script: Sequence[str] = PRETRAIN,
    options: Sequence[str] = ("--cpu",),
    timeout: float = 240.0,
    env: Mapping[str, str] | None = None,
    pythonpath: Sequence[str] = (),
    fresh: bool = False,
    check: bool = True,
) -> Run:
    """Train with ``nproc`` processes of this machine and collect what they print.

    ``script`` is a path, or ``("-m", module)``; ``options`` are the launcher's. ``pythonpath``
    goes in front (another Megatron, say). The processes are forked from one that has done the
    imports; ``fresh`` or other ``options`` start new interpreters instead, in which ``LOCAL_RANK``
    of ``env`` holds for all (one device for several processes).
    With ``check`` a failing run raises ``AssertionError`` with the end of the output; a run that
    outlives ``timeout`` is killed and always raises.
    """
    argv = [*options, *script, *map(str, flags)]
    ranks = {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        **(env or {}),
    }
    if fresh or tuple(options) != ("--cpu",):
        start = functools.partial(_run_fresh, pythonpath)
    else:
        start = _zygote(tuple(pythonpath)).run
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"rank{rank}.log") for rank in range(nproc)]
        returncode = start(argv, ranks, logs, timeout)
        output = "\n".join(log.read_text(errors="replace") for log in logs)
    result = Run(returncode, output, seconds=time.monotonic() - started)
    _parse(result)
    if returncode is None:
        raise AssertionError(
            f"still running after {timeout} s: {shlex.join(argv)}\n{result.tail()}"
        )
    if check and returncode:
        raise AssertionError(f"exit {returncode}: {shlex.join(argv)}\n{result.tail()}")
    return result


def _environment(pythonpath: Sequence[str] = ()) -> dict[str, str]:
    folders = [*pythonpath, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}


def _run_fresh(
    pythonpath: Sequence[str], argv: list[str], ranks: dict, logs: list[Path], timeout: float
) -> int | None:
    """New interpreters; the exit code as ``zygote.wait`` gives it."""
    pids = []
    for rank, log in enumerate(logs):
        environment = {**_environment(pythonpath), **ranks, "RANK": str(rank)}
        environment["LOCAL_RANK"] = ranks.get("LOCAL_RANK", str(rank))
        with log.open("wb") as out:
            command = [sys.executable, "-m", "tests.harness.runner", *argv]
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        pids.append(process.pid)
    return zygote.wait(pids, timeout)


class _Zygote:
    """The forking process (see ``zygote.py``), started at the first run of a test session."""

    def __init__(self, pythonpath: tuple[str, ...]) -> None:
        answers, child_end = os.pipe()
        environment = {
            **_environment(pythonpath),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "LOCAL_WORLD_SIZE": "64",
            "MOE_INJECT_ZYGOTE_ANSWERS": str(child_end),
        }
        command = [sys.executable, "-m", "tests.harness.zygote"]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as the process
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=(child_end,),
            text=True,
        )
        os.close(child_end)
        self._answers = os.fdopen(answers)
        atexit.register(self._end)

    def _end(self) -> None:
        """It ends by itself, and what it has started with it, as nothing more can come."""
        self._process.stdin.close()
        try:
            self._process.wait(zygote.GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def run(self, argv: list[str], ranks: dict, logs: list[Path], timeout: float) -> int | None:
        request = {"argv": [sys.argv[0], *argv], "env": ranks, "seconds": timeout}
        request["logs"] = list(map(str, logs))
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._answers.readline()
        if not answer:
            self._log.seek(0)
            code, log = self._process.wait(), self._log.read()
            raise AssertionError(f"the process that forks the ranks ended ({code}):\n{log}")
        return json.loads(answer)["returncode"]


@functools.cache
def _zygote(pythonpath: tuple[str, ...]) -> _Zygote:
    return _Zygote(pythonpath)


def _parse(result: Run) -> None:
    """Fill in the iterations and evaluations: Megatron's log line, and exact values over it.

    What is known exactly of any step is taken from exact values alone: Megatron's second line has
    the first step in it too, and with it terms that the second step has nothing of.
    """
    logged: dict[int, dict[str, float]] = {}
    printed: dict[int, dict[str, float]] = {}
    for line in result.output.splitlines():
        if match := re.search(r"iteration\s+(\d+)/\s*\d+ \|(.*)", line):
            numbers = re.findall(r"([^|:]+):\s*([-+.\dE]+|nan|inf)\s*\|", match[2])
            values = {name.strip(): float(value) for name, value in numbers}
            printed.setdefault(int(match[1]), {}).update(values)
        elif line.startswith(PREFIX):
            record = json.loads(line[len(PREFIX) :])
            if "evaluation" in record:
                result.evaluations.append(record["evaluation"])
            else:
                logged.setdefault(record["iteration"], {}).update(record)
    known = {name for values in logged.values() for name in values}
    for iteration, values in printed.items():
        own = logged.setdefault(iteration, {})
        own |= {n: v for n, v in values.items() if n not in own and (not own or n not in known)}
    result.iterations = [{"iteration": i, **logged[i]} for i in sorted(logged)]


def approx(values: Sequence[float | None], **tolerances: float) -> list:
    """``pytest.approx`` of each value of ``Run.losses``; a value that is not there stays None."""
    return [v if v is None else pytest.approx(v, **tolerances) for v in values]


def same_runs(run: Run, other: Run) -> None:
    """Both runs logged the same numbers bit for bit."""
    for ours, theirs in zip(run.iterations, other.iterations, strict=True):
        timing = "elapsed time per iteration (ms)"
        assert {**ours, timing: 0} == {**theirs, timing: 0}
    assert run.iterations
    assert run.evaluations == other.evaluations
