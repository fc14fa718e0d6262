"""Harness: real Megatron training runs on the CPU lane, as child processes, with their numbers.

run = lane.run(lane.moe("--sequence-parallel", tp=2, ep=2), nproc=2)
run.losses("lm loss")        # one exact float per iteration
run.iterations[0]            # everything of the first iteration, grad norm included
run.evaluations, run.output, run.returncode
"""

from __future__ import annotations

import json
import os
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

from tests.training.runner import PREFIX

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ("-m", "megatron_moe_inject.pretrain")
MINIMAL_GPT = (str(Path(__file__).with_name("minimal_gpt.py")),)

MODEL = shlex.split(
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 "
    "--seq-length 32 --max-position-embeddings 32 --position-embedding-type rope "
    "--normalization RMSNorm --swiglu --disable-bias-linear --attention-dropout 0 "
    "--hidden-dropout 0 --untie-embeddings-and-output-weights --use-cpu-initialization"
)
DATA = shlex.split("--mock-data --tokenizer-type NullTokenizer --vocab-size 127 --num-workers 0")
TRAIN = shlex.split(
    "--micro-batch-size 2 --global-batch-size 8 --train-iters 3 --lr 1e-3 --log-interval 1 "
    "--eval-iters 1 --eval-interval 1000"
)
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

    def losses(self, name: str = "lm loss") -> list[float]:
        """One value per iteration of a loss, ``grad norm``, or any number of Megatron's log."""
        return [iteration[name] for iteration in self.iterations]

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
    """A TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(
    flags: Sequence[str],
    *,
    nproc: int = 1,
    script: Sequence[str] = PRETRAIN,
    options: Sequence[str] = ("--cpu",),
    timeout: float = 240.0,
    env: Mapping[str, str] | None = None,
    pythonpath: Sequence[str] = (),
    check: bool = True,
) -> Run:
    """Train with ``nproc`` processes of this machine and collect what they print.

    ``script`` is a path, or ``("-m", module)``; ``options`` are the launcher's. ``pythonpath``
    goes in front (another Megatron, say). With ``check`` a failing run raises ``AssertionError``
    with the end of the output; a run that outlives ``timeout`` is killed and always raises.
    """
    command = [sys.executable, "-m", "tests.training.runner", *options, *script, *map(str, flags)]
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([*pythonpath, str(ROOT)]),
        "PYTHONWARNINGS": "ignore",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        **(env or {}),
    }
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"rank{rank}.log") for rank in range(nproc)]
        processes = []
        for rank, log in enumerate(logs):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("wb") as out:
                processes.append(
                    subprocess.Popen(
                        command, env={**shared, **ranks}, stdout=out, stderr=subprocess.STDOUT
                    )
                )
        returncode = _wait(processes, started + timeout)
        output = "\n".join(log.read_text(errors="replace") for log in logs)
    result = Run(returncode, output, seconds=time.monotonic() - started)
    _parse(result)
    if returncode is None:
        raise AssertionError(
            f"still running after {timeout} s: {' '.join(command)}\n{result.tail()}"
        )
    if check and returncode:
        raise AssertionError(f"exit {returncode}: {' '.join(command)}\n{result.tail()}")
    return result


def _wait(processes: list[subprocess.Popen], deadline: float) -> int | None:
    """The first non-zero exit code, 0 when all end well, None at the deadline; none survives.

    Once one process has failed, the others get a little time to say why they stop.
    """
    failed = None
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if failed is None and any(process.returncode for process in processes):
            failed = next(p.returncode for p in processes if p.returncode)
            deadline = min(deadline, time.monotonic() + 5.0)
        time.sleep(0.1)
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.kill()
        process.wait()
    if failed is None and running:
        return None
    return failed or next((p.returncode for p in processes if p.returncode), 0)


def _parse(result: Run) -> None:
    """Fill in the iterations and evaluations: Megatron's log line, and exact values over it."""
    logged: dict[int, dict[str, float]] = {}
    for line in result.output.splitlines():
        if match := re.search(r"iteration\s+(\d+)/\s*\d+ \|(.*)", line):
            numbers = re.findall(r"([^|:]+):\s*([-+.\dE]+|nan|inf)\s*\|", match[2])
            values = {name.strip(): float(value) for name, value in numbers}
            logged.setdefault(int(match[1]), {}).update({**values, **logged.get(int(match[1]), {})})
        elif line.startswith(PREFIX):
            record = json.loads(line[len(PREFIX) :])
            if "evaluation" in record:
                result.evaluations.append(record["evaluation"])
            else:
                logged.setdefault(record["iteration"], {}).update(record)
    result.iterations = [{"iteration": i, **logged[i]} for i in sorted(logged)]
