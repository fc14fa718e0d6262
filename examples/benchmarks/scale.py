"""What the plugin says between ranks: messages and bytes of each collective by the number of ranks.

    python examples/benchmarks/scale.py [--ranks 1 2 4] [--steps 3] [--layout=FLAGS]
    python examples/benchmarks/scale.py --simulate 64 256 1024 4096

The first form trains for real on the CPU lane, one injection with a teacher, an original model,
steering and a proof of what is frozen, and lists every collective that the package's own code
calls: where, of what, in which phase (start, steps, end), how many bytes the busiest rank sends and
gets. The second gives one process a world of that many ranks and times what a rank does at start
beside the messages themselves: judging all ranks' recipes, agreeing, reading all ranks' counts.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECIPE = """
domains:
  - {{name: domain, data: [1], teacher: small, experts: {{layers: {{2: [1], 3: [0, 3]}}}}}}
teachers:
  small: {{source: "megatron:{teacher}"}}
objective: {{alpha: 0.5, beta: 0.3, gamma: 0.2}}
train: {{experts: selected, router: true}}
steering: {{coeff: 0.1, target_mass: 0.5}}
"""
_TENSORS = (
    "all_reduce", "broadcast", "all_gather_into_tensor", "all_gather", "reduce_scatter_tensor",
    "batch_isend_irecv", "barrier",
)  # fmt: skip
_OBJECTS = ("all_gather_object", "gather_object", "broadcast_object_list")
_GROUPS = ("new_group", "new_subgroups_by_enumeration")
_PACKAGE = "megatron_moe_inject"


def flags(folder: Path, hidden: int, *more: str) -> list[str]:
    """Flags that student and teacher share."""
    text = (
        f"--num-layers 4 --hidden-size {hidden} --num-attention-heads 4 --seq-length 64 "
        "--max-position-embeddings 64 --position-embedding-type rope --normalization RMSNorm "
        "--swiglu --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 "
        "--tokenizer-type NullTokenizer --vocab-size 255 --num-workers 0 --lr 1e-4 "
        "--untie-embeddings-and-output-weights --micro-batch-size 1 --global-batch-size 8 "
        "--eval-interval 100000 --eval-iters 0 --log-interval 1000 "
        f"--data-path 1 {folder}/text 1 {folder}/domain --split 100,0,0"
    )
    return [*text.split(), *more]


_MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-layer-freq 1 --moe-ffn-hidden-size 64 "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 "
    "--moe-token-dispatcher-type alltoall"
)
MOE = _MOE.split()


class Recorder:
    """Counts what the package's code says, by phase, place, call and size of the group."""

    def __init__(self) -> None:
        self.phase = "start"
        self.calls: dict[tuple[str, str, str, int], list[int]] = defaultdict(lambda: [0, 0, 0])

    def install(self) -> None:
        """Stand in for the collectives of ``torch.distributed``, which callers look up there."""
        import torch.distributed as dist

        for name in (*_TENSORS, *_OBJECTS, *_GROUPS):
            setattr(dist, name, self._around(getattr(dist, name), name))

    def _around(self, stock: Callable, name: str) -> Callable:
        @functools.wraps(stock)
        def call(*args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            path = frame.f_code.co_filename
            result = stock(*args, **kwargs)
            if f"/{_PACKAGE}/" in path:
                place = path.rpartition(f"/{_PACKAGE}/")[2]
                if place == "host/agreement.py":  # told by who asks
                    frame = _asking(frame)
                    place = frame.f_code.co_filename.rpartition(f"/{_PACKAGE}/")[2]
                given = inspect.signature(stock).bind(*args, **kwargs)
                given.apply_defaults()
                self._note(f"{place} {frame.f_code.co_name}", name, given.arguments)
            return result

        return call

    def _note(self, place: str, name: str, given: dict[str, Any]) -> None:
        import torch.distributed as dist

        members = given.get("ranks")
        size = len(members) if members else dist.get_world_size(given.get("group"))
        sent, received = _bytes(name, list(given.values()))
        entry = self.calls[self.phase, place, name, size]
        for index, value in enumerate((1, sent, received)):
            entry[index] += value


def _asking(frame: Any) -> Any:
    while frame.f_code.co_filename.endswith("host/agreement.py") and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _bytes(name: str, args: list[Any]) -> tuple[int, int]:
    """What this rank hands over, and what it holds afterwards."""
    if name in ("barrier", *_GROUPS):
        return 0, 0
    if name == "all_gather_object":
        return len(pickle.dumps(args[1])), sum(len(pickle.dumps(entry)) for entry in args[0])
    if name == "gather_object":
        whole = args[1] or []
        return len(pickle.dumps(args[0])), sum(len(pickle.dumps(entry)) for entry in whole)
    if name == "broadcast_object_list":
        return len(pickle.dumps(args[0])), len(pickle.dumps(args[0]))
    if name == "batch_isend_irecv":
        size = sum(operation.tensor.nbytes for operation in args[0])
        return size, size
    own = args[1] if name in ("all_gather_into_tensor", "all_gather") else args[0]
    whole = args[0] if isinstance(args[0], list) else [args[0]]
    return own.nbytes, sum(tensor.nbytes for tensor in whole)


def worker(out: str, arguments: list[str]) -> None:
    """One rank: train as the arguments say, and write what was said."""
    sys.argv[1:] = ["--cpu", *arguments]
    from megatron_moe_inject.launch import prepare

    recorder = Recorder()
    recorder.install()
    prepare()
    from megatron.training import training

    from megatron_moe_inject.host import gpt_entry
    from megatron_moe_inject.host.meeting import Meeting

    stock_step, stock_decide = training.train_step, Meeting.decide
    number = [0]

    @functools.wraps(stock_step)
    def train_step(*args: Any, **kwargs: Any) -> Any:
        recorder.phase = f"step {number[0]}"
        number[0] += 1
        try:
            return stock_step(*args, **kwargs)
        finally:
            recorder.phase = "end"

    def decide(self: Meeting, own: Any, judge: Callable) -> Any:
        entry = recorder.calls["start", "recipe/same_recipe.py begin_alike", "store", self.size]
        size = len(json.dumps(own))
        entry[0], entry[1] = entry[0] + 1, entry[1] + size
        entry[2] += size * self.size if self.rank == 0 else 4
        return stock_decide(self, own, judge)

    training.train_step, Meeting.decide = train_step, decide  # type: ignore[method-assign]
    rank = os.environ["RANK"]
    try:
        gpt_entry.main()
    finally:
        rows = [[*key, *value] for key, value in recorder.calls.items()]
        Path(out, f"{rank}.json").write_text(json.dumps(rows))


def launch(ranks: int, *words: str) -> None:
    """``torchrun``; its output is shown only if it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, text=True, stdout=-1, stderr=-2, check=False)
    if done.returncode:
        sys.exit(done.stdout)


def corpora(folder: Path) -> None:
    """Two small data sets of random tokens."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    numbers = np.random.default_rng(0)
    for name in ("text", "domain"):
        builder = IndexedDatasetBuilder(f"{folder}/{name}.bin", dtype=np.int32)
        for _ in range(64):
            builder.add_document(torch.from_numpy(numbers.integers(0, 255, 128)), [128])
        builder.finalize(f"{folder}/{name}.idx")


def measure(options: argparse.Namespace) -> None:
    """Train at each number of ranks; print one table for each phase."""
    sizes: dict[str, dict[int, tuple[int, int, int]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpora(folder)
        entry = ("-m", "megatron_moe_inject.pretrain", "--cpu")
        once = ("--train-iters", "1", "--save-interval", "1", "--save")
        launch(1, *entry, *flags(folder, 32, *once, f"{folder}/teacher"))
        launch(1, *entry, *flags(folder, 64, *MOE, *once, f"{folder}/student"))
        (folder / "recipe.yaml").write_text(RECIPE.format(teacher=f"{folder}/teacher"))
        for ranks in options.ranks:
            out = folder / f"out{ranks}"
            out.mkdir()
            run = flags(folder, 64, *MOE, "--train-iters", str(options.steps), "--finetune")
            run += ["--no-load-optim", "--no-load-rng", "--load", f"{folder}/student"]
            run += ["--save", f"{folder}/saved{ranks}", "--save-interval", "1000"]
            run += ["--expert-model-parallel-size", str(min(ranks, 2)), *options.layout.split()]
            run += ["--inject-recipe", f"{folder}/recipe.yaml", "--inject-verify-frozen"]
            launch(ranks, __file__, "--worker", str(out), *run)
            _add(sizes, ranks, out, options.steps)
    _print(sizes, options.ranks)


def _add(
    sizes: dict[str, dict[int, tuple[int, int, int]]], ranks: int, out: Path, steps: int
) -> None:
    """By place: the most that any rank says and hears. Of the steps, the last counts."""
    most: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for path in out.glob("*.json"):
        own: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        for phase, place, call, _, *counts in json.loads(path.read_text()):
            if phase.startswith("step") and phase != f"step {steps - 1}":
                continue
            phase = "step" if phase.startswith("step") else phase
            key = f"{phase} | {place} | {call}"
            own[key] = [a + b for a, b in zip(own[key], counts, strict=True)]
        for key, counts in own.items():
            most[key] = [max(pair) for pair in zip(most[key], counts, strict=True)]
    for key, counts in most.items():
        sizes.setdefault(key, {})[ranks] = (counts[0], counts[1], counts[2])


def _print(sizes: dict[str, dict[int, tuple[int, int, int]]], ranks: list[int]) -> None:
    columns = " | ".join(f"{n} ranks: calls, sent, held" for n in ranks)
    print(f"| phase | where | call | {columns} |")
    print("|" + "---|" * (3 + len(ranks)))
    order = ("start", "step", "end")
    for key in sorted(sizes, key=lambda key: (order.index(key.split(" | ")[0]), key)):
        cells = [", ".join(f"{x:,}" for x in sizes[key].get(n, (0, 0, 0))) for n in ranks]
        print(f"| {key} | " + " | ".join(cells) + " |")


def simulate(worlds: list[int]) -> None:
    """Time of a rank's work at start in worlds of these sizes; one process, no messages."""
    columns = [_simulated(world) for world in worlds]
    print("| seconds on one rank | " + " | ".join(f"{world:,} ranks" for world in worlds) + " |")
    print("|" + "---|" * (1 + len(worlds)))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.4f}" for column in columns) + " |")


def _simulated(world: int) -> dict[str, float]:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_moe_inject.experts.train.census import ParameterRow, parameter_table
    from megatron_moe_inject.host import agreement
    from megatron_moe_inject.host.meeting import Meeting
    from megatron_moe_inject.host.model_parts import COMPONENTS
    from megatron_moe_inject.recipe.same_recipe import judge

    layers, experts, tensors = 61, 256, 32_000
    report = {
        "does": {f"domains[{i // 40}].key{i % 40}": f'"a value of {i}"' for i in range(120)}
        | {f"domains[0].experts.layers.{i}": str(list(range(8))) for i in range(layers)}
    }
    text = json.dumps(report)
    store = dist.HashStore()
    for rank in range(1, world):
        store.set(f"moe-inject/said by {rank}", text)
    meeting = Meeting(store, 0, world, 60.0)
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        return {
            f"first rank: reads and judges all recipes ({len(text):,} bytes each)": _timed(
                lambda: meeting.decide(report, lambda said: judge(said, world))
            ),
            "agree(), once": _timed(lambda: agreement.agree(lambda: None)),
            f"what was asked of {tensors:,} stored tensors": _timed(
                lambda: agreement.union(range(0, tensors, 2), tensors)
            ),
            "numbers of each rank, and the plan's table": _timed(
                lambda: _table(agreement, COMPONENTS, ParameterRow, parameter_table)
            ),
            f"which of {layers} x {experts} experts any rank has": _timed(
                lambda: agreement.union(range(layers), layers * experts)
            ),
        }
    finally:
        dist.destroy_process_group()


def _table(agreement: Any, components: Any, row: Any, table: Any) -> list[str]:
    ranks = agreement.of_each_rank([1] * len(components))
    return table([row(c, 1, 1, [r[i] for r in ranks]) for i, c in enumerate(components)])


def _timed(action: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - begin)
    return best


def main() -> None:
    """See the module's docstring."""
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--layout", default="", help="more flags, as one word")
    parser.add_argument("--simulate", type=int, nargs="+", metavar="RANKS")
    options = parser.parse_args()
    if options.simulate:
        simulate(options.simulate)
    else:
        measure(options)


if __name__ == "__main__":
    main()
