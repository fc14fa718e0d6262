"""A training step on one GPU: stock Megatron, the plugin switched off, and what each feature adds.

    python examples/benchmarks/gpu/step_bench.py [--precisions bf16 fp8] [--steps 8] [--json FILE]

Real ``pretrain()`` runs under Transformer Engine with grouped GEMM, on two data sets of random ids,
a student of random weights and a dense teacher that was saved after one step. Arms are alive at
once, as many as fit (--together), and take their steps in turns; with more arms there are rounds,
each with what its arms are compared with. Times are medians of a step between device
synchronisations. The last steps run under torch's profiler, which tells for how long the device was
busy, whatever the host takes to launch, and what its kernels were (--json). Memory is
torch's: of the bare model, and the peak of the timed steps. Without a GPU it runs on the CPU lane,
to be tried.
"""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from turns import Running, launch, take_turns, tell

SIZES = {"layers": 4, "hidden": 2048, "ffn": 1408, "experts": 16, "topk": 4, "chosen": 2}
SIZES |= {"heads": 16, "seq": 4096, "vocab": 32768, "micro-batch": 4, "global-batch": 8}
SIZES |= {"teacher-layers": 4, "teacher-hidden": 1024, "teacher-ffn": 2816}
GIB = 2**30
PRECISIONS = {
    "bf16": ("--bf16",),
    "fp8": ("--bf16", "--fp8-format", "e4m3", "--fp8-recipe", "blockwise"),
}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        fields: of the recipe (``--inject-set``); None = no recipe.
        plugin: whether the plugin is installed.
        beside: the arm that its time is a multiple of.
        only: the precision that it belongs to, None = all.
        places: how many of --together it takes, by its memory.
        taught: whether there is a teacher.
    """

    title: str
    fields: tuple[str, ...] | None
    plugin: bool = True
    beside: str = "stock"
    only: str | None = None
    places: int = 1
    taught: bool = True


TAUGHT = ("objective.alpha=1.0", "objective.beta=0.0")
ADAPTED = ("objective.alpha=0.0", "objective.beta=1.0", "train.experts=none")
ARMS = {
    "stock": Arm("stock Megatron, everything trains", None, plugin=False, places=2),
    "off": Arm("plugin installed, no recipe", None, places=2),
    "freeze": Arm(
        "chosen experts train, cross-entropy",
        ("objective.alpha=0.0", "objective.beta=1.0"),
        taught=False,
    ),
    "kd": Arm("+ teacher, distillation alone", TAUGHT),
    "gamma": Arm("+ retention on general data", (*TAUGHT, "objective.gamma=1.0"), beside="kd"),
    "host": Arm(
        "+ retention, originals in host memory",
        (*TAUGHT, "objective.gamma=1.0", "retention.originals=host"),
        beside="gamma",
    ),
    "steering": Arm(
        "+ steering of target rows, by confidence",
        (*TAUGHT, "train.router_rows=true", "steering.coeff=0.01", "steering.confidence=label"),
        beside="kd",
    ),
    "features": Arm("+ imitation of hidden states", (*TAUGHT, "imitation.hidden=0.5"), beside="kd"),
    "adapters": Arm(
        "adapters of rank 8 on all experts and attention, cross-entropy",
        (*ADAPTED, "train.adapters=[{targets: [experts, attention], experts: all, rank: 8}]"),
        beside="bare",
        taught=False,
    ),
    "grouped": Arm(
        "adapters of rank 8 on all experts alone, cross-entropy",
        (*ADAPTED, "train.adapters=[{targets: [experts], experts: all, rank: 8}]"),
        beside="bare",
        taught=False,
    ),
    "domain": Arm(
        "adapters of rank 8 on all experts, of the domain's rows alone, cross-entropy",
        (
            *ADAPTED,
            "train.adapters=[{targets: [experts], experts: all, rank: 8, by: domain}]",
        ),
        beside="grouped",
        taught=False,
    ),
    "retained": Arm(
        "+ retention of experts' outputs", (*TAUGHT, "retention.experts=1.0"), beside="kd"
    ),
    "imitated": Arm(
        "+ imitation of experts' outputs", (*TAUGHT, "imitation.experts=0.5"), beside="kd"
    ),
    "everything": Arm("teacher, everything trains", (*TAUGHT, "train.everything=true"), places=2),
    "bare": Arm(
        "norms alone train, cross-entropy: what adapters stand beside",
        (*ADAPTED, "train.norms=true"),
        taught=False,
    ),
    "frozen": Arm(
        "+ frozen experts in FP8 alone",
        (*TAUGHT, "train.frozen_experts=fp8"),
        beside="kd",
        only="fp8",
    ),
    "teacher": Arm(
        "+ teacher in FP8", (*TAUGHT, "teachers.coder.fp8=blockwise"), beside="kd", only="fp8"
    ),
}
RECIPES = {  # by Arm.taught
    False: """
domains:
  - {{name: code, data: [1], experts: {{layers: {experts}}}}}
""",
    True: """
domains:
  - {{name: code, data: [1], teacher: coder, experts: {{layers: {experts}}}}}
teachers:
  coder: {{source: "megatron:{teacher}"}}
""",
}


def common_flags(o: argparse.Namespace, data: list[str]) -> list[str]:
    text = (
        f"--seq-length {o.seq} --max-position-embeddings {o.seq} --position-embedding-type rope "
        "--normalization RMSNorm --swiglu --disable-bias-linear --attention-dropout 0 "
        "--hidden-dropout 0 --untie-embeddings-and-output-weights --tokenizer-type NullTokenizer "
        f"--vocab-size {o.vocab - 1} --num-workers 1 --micro-batch-size {o.micro_batch} "
        f"--global-batch-size {o.global_batch} --lr 1e-4 --eval-interval 100000 --eval-iters 0 "
        "--log-interval 1000 --split 100,0,0 --no-gradient-accumulation-fusion"
    )
    # Masks of s x s for each sample, which TE does not need, would be what a step waits for.
    kind = ["--transformer-impl", "transformer_engine", "--no-create-attention-mask-in-dataloader"]
    kind = [] if o.cpu else kind
    return [*text.split(), *kind, "--data-path", *data]


def student_flags(o: argparse.Namespace, data: list[str], precision: str) -> list[str]:
    text = (
        f"--num-layers {o.layers} --hidden-size {o.hidden} --num-attention-heads {o.heads} "
        f"--num-experts {o.experts} --moe-router-topk {o.topk} --ffn-hidden-size {o.ffn} "
        f"--moe-ffn-hidden-size {o.ffn} --moe-token-dispatcher-type alltoall "
        "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 "
        f"--train-iters {all_steps(o)}"
    )
    more = [*PRECISIONS[precision], *shlex.split(o.flags)]
    more += [] if o.cpu else ["--moe-grouped-gemm"]
    return [*common_flags(o, data), *text.split(), *more]


def all_steps(o: argparse.Namespace) -> int:
    """Of a run: untimed, timed, traced."""
    return o.warm_up + o.steps + o.traced


def write_data(folder: Path, o: argparse.Namespace) -> list[str]:
    """Two data sets of random ids, enough for a run; their prefixes."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(0)
    prefixes = []
    for name in ("general", "domain"):
        prefix = str(folder / name)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        for _ in range((all_steps(o) + 2) * o.global_batch):
            ids = torch.from_numpy(rng.integers(o.vocab - 2, size=o.seq + 1))
            builder.add_document(ids, [len(ids)])
        builder.finalize(f"{prefix}.idx")
        prefixes.append(prefix)
    return prefixes


def make_teacher(folder: Path, o: argparse.Namespace, domain: str) -> Path:
    """A dense teacher, saved after one step."""
    sizes = (
        f"--num-layers {o.teacher_layers} --hidden-size {o.teacher_hidden} "
        f"--num-attention-heads {o.heads} --ffn-hidden-size {o.teacher_ffn} --train-iters 1 --bf16 "
        f"--save {folder / 'teacher'} "
        "--save-interval 100 --no-save-optim"
    )
    flags = [*common_flags(o, [domain]), *sizes.split()]
    lane = ["--cpu"] if o.cpu else []
    command = [sys.executable, "-m", "megatron_moe_inject.pretrain", *lane, *flags]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any port: nobody else connects
    done = subprocess.run(
        command,
        env=os.environ | alone,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        raise SystemExit(f"the teacher could not be made:\n{done.stdout[-2000:]}{done.stderr}")
    return folder / "teacher"


def wanted(arms: Sequence[str], precisions: Sequence[str]) -> list[str]:
    """Titles ``precision-arm``, of arms that name their precision or come in all of these."""
    titles = []
    for name in arms:
        own, _, arm = name.rpartition("-")
        titles += [
            f"{precision}-{arm}"
            for precision in ([own] if own else precisions)
            if ARMS[arm].only in (None, precision)
        ]
    return sorted(titles, key=lambda title: list(PRECISIONS).index(title.partition("-")[0]))


def arm_of(title: str) -> Arm:
    return ARMS[title.partition("-")[2]]


def compared_with(title: str) -> list[str]:
    """The titles that an arm's ratios need, itself last."""
    precision, _, arm = title.partition("-")
    beside = ARMS[arm].beside
    return [*(compared_with(f"{precision}-{beside}") if beside != arm else []), title]


def plan_rounds(titles: Sequence[str], together: int) -> list[list[str]]:
    """Arms in rounds of ``together`` places if that can be, each with what it is compared with."""
    rounds: list[list[str]] = []
    for title in titles:
        needed = [other for other in compared_with(title) if other in titles]
        for found in rounds:
            union = list(dict.fromkeys([*found, *needed]))
            if sum(arm_of(other).places for other in union) <= together:
                found[:] = union
                break
        else:
            rounds.append(needed)
    return rounds


def start(
    port: int, o: argparse.Namespace, folder: Path, titles: Sequence[str]
) -> dict[str, Running]:
    """Arms by their titles."""
    data = [str(folder / "general"), str(folder / "domain")]
    experts = {i: sorted((i + 3 * j) % o.experts for j in range(o.chosen)) for i in range(o.layers)}
    for taught, recipe in RECIPES.items():
        text = recipe.format(experts=experts, teacher=o.teacher)
        (folder / f"recipe-{taught}.yaml").write_text(text)
    found = {}
    for title in titles:
        arm, precision = arm_of(title), title.partition("-")[0]
        flags = student_flags(o, ["0.1", data[0], "0.9", data[1]], precision)
        if arm.fields is not None:
            recipe = str(folder / f"recipe-{arm.taught}.yaml")
            flags += ["--inject-recipe", recipe, "--inject-from-scratch"]
            flags += ["--inject-set", *arm.fields]
        if o.cpu and arm.plugin:
            flags = ["--cpu", *flags]
        spec = {"port": port, "arm": title, "cpu": o.cpu, "plugin": arm.plugin, "flags": None}
        # The first steps compile kernels, for which no arm needs to wait for the others.
        spec |= {"warm_up": o.warm_up, "steps": all_steps(o), "warm_up_at_once": True}
        spec |= {"traced": 0 if o.cpu else o.traced}
        found[title] = launch(spec, flags, 1, o.threads, folder)
    return found


def measure(o: argparse.Namespace, folder: Path) -> Iterator[list[dict[str, Any]]]:
    """Rows, one for an arm of a precision in a round: after each round all that there are."""
    rows: list[dict[str, Any]] = []
    for number, titles in enumerate(plan_rounds(wanted(o.arms, o.precisions), o.together)):
        found = take_turns(
            functools.partial(start, o=o, folder=folder, titles=titles),
            o.steps + o.traced,
            timeout=o.timeout,
            start_timeout=o.start_timeout,
            label=f"step_bench round {number + 1}",
        )
        rows += [{"round": number, **row} for row in rows_of(found, o)]
        yield rows


def rows_of(arms: dict[str, Running], o: argparse.Namespace) -> list[dict[str, Any]]:
    """What the arms of a round answered."""
    rows = []
    for title, running in arms.items():
        precision, _, name = title.partition("-")
        row = {"precision": precision, "arm": name, "title": ARMS[name].title}
        if running.ended:
            row["ended"] = running.ended
            if o.logs:
                o.logs.mkdir(parents=True, exist_ok=True)
                text = "".join(log.read_text(errors="replace") for log in running.logs)
                (o.logs / f"{title}.log").write_text(text[-20000:])
        else:
            (answers,) = zip(*running.steps, strict=True)
            last = answers[-1]
            row["seconds"] = [answer["seconds"] for answer in answers[: o.steps]]
            row |= {key: last[key] for key in ("built_bytes", "trained", "optimizer_bytes")}
            row |= mean_trace([answer for answer in answers[o.steps :] if "kernels" in answer])
            row["peak_bytes"] = last["peak_bytes"] + last["built_bytes"]
        rows.append(row)
    return rows


def mean_trace(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """What the profiler saw in a step, of several; {} of none."""
    if not answers:
        return {}
    count, sums = len(answers), {}
    for name, milliseconds, launches in (row for answer in answers for row in answer["kernels"]):
        found = sums.setdefault(name, [0.0, 0])
        found[0] += milliseconds / count
        found[1] += launches / count
    kernels = [[name, round(ms, 3), round(launches, 1)] for name, (ms, launches) in sums.items()]
    return {
        "device_seconds": statistics.mean(answer["device_seconds"] for answer in answers),
        "launches": round(statistics.mean(answer["launches"] for answer in answers)),
        "kernels": sorted(kernels, key=lambda row: -row[1]),
    }


def render(result: dict[str, Any]) -> list[str]:
    """The table."""
    sizes, rows = result["sizes"], result["rows"]
    by = {(row["precision"], row["round"], row["arm"]): row for row in rows}
    first: dict[tuple[str, str], dict] = {}
    for row in rows:
        if "ended" in first.setdefault((row["precision"], row["arm"]), row):
            first[row["precision"], row["arm"]] = row
    tokens = sizes["global-batch"] * sizes["seq"]
    lines = [
        result["machine"],
        ", ".join(f"{name} {value}" for name, value in sizes.items()),
        "",
        "| precision | arm | ms a step | of stock | of the arm it adds to | device ms | of stock | "
        "of the arm it adds to | launches | tokens/s | model GiB | peak GiB |",
        f"|{'---|' * 12}",
    ]
    for row in first.values():
        cells = [row["precision"], row["title"]]
        if "ended" in row:
            lines.append(f"| {' | '.join(cells)} | {row['ended']} |{' |' * 9}")
            continue

        def compared(seconds: Callable[[dict], float | None], row: dict = row) -> list[str]:
            """Milliseconds, of stock, of the arm it adds to."""
            beside = ARMS[row["arm"]].beside
            own, shares = seconds(row), []
            for other in ("stock", beside if beside != "stock" else ""):
                found = by.get((row["precision"], row["round"], other), {})
                base = seconds(found)
                shares.append(f"{own / base:.3f}" if own and base else "")
            return [f"{own * 1e3:.1f}" if own else "", *shares]

        wall = statistics.median(row["seconds"])
        cells += compared(
            lambda row: statistics.median(row["seconds"]) if "seconds" in row else None
        )
        cells += compared(lambda row: row.get("device_seconds"))
        cells += [f"{row.get('launches', '')}", f"{tokens / wall:,.0f}"]
        cells += [f"{row[key] / GIB:.2f}" for key in ("built_bytes", "peak_bytes")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", default=list(ARMS),
        choices=[*ARMS, *(f"{precision}-{arm}" for precision in PRECISIONS for arm in ARMS)],
        help=f"of {', '.join(ARMS)}, or with one precision as in fp8-kd",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--traced", type=int, default=3, help="steps under the profiler")
    parser.add_argument("--warm-up", type=int, default=3)
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--together", type=int, default=6, help="places for arms alive at once")
    parser.add_argument("--teacher", type=Path, help="a saved teacher of these sizes; made without")
    parser.add_argument("--flags", default="", help="more Megatron flags for every arm, quoted")
    parser.add_argument("--timeout", type=float, default=60.0, help="of one step, in seconds")
    parser.add_argument("--start-timeout", type=float, default=200.0, help="in seconds")
    parser.add_argument("--json", type=Path, help="write what was measured there")
    parser.add_argument("--logs", type=Path, help="keep the logs of arms that fail there")
    options = parser.parse_args()
    import torch

    options.cpu, options.threads = not torch.cuda.is_available(), 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_data(folder, options)
        if options.teacher is None:
            options.teacher = make_teacher(folder, options, data[1])
        for rows in measure(options, folder):
            tell("gpu/step_bench.py", options, SIZES, rows, render)


if __name__ == "__main__":
    main()
