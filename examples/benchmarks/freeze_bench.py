"""What freezing saves: step time, memory, gradient and optimizer bytes, beside stock Megatron.

    python examples/benchmarks/freeze_bench.py [--layouts single ep2 pp2] [--steps 8] [--json FILE]

Real Megatron training, cross-entropy only, the same model and data in every arm: everything
trained; chosen experts in every layer; the same in the last quarter of the layers; adapters on
chosen experts, or all, and attention, also as those of one domain; and stock Megatron without the
plugin whose script sets ``requires_grad`` before DDP. All arms of a layout are alive at once and
take their steps in turns, so that the noise of the machine hits all alike. An arm that crashes or
hangs is reported with how it ended. On a machine without a GPU it runs on the CPU lane. Beside each
ratio stands what arithmetic allows.
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freeze_report import render
from turns import Running, launch, take_turns, tell

LAYOUTS = {
    "single": (1, ""),
    "ep2": (2, "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "single-recompute": (
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
}


SIZES = {"layers": 8, "hidden": 256, "ffn": 512, "experts": 8, "topk": 2, "chosen": 2}
SIZES |= {"seq": 256, "vocab": 512, "micro-batch": 2, "global-batch": 8}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        plugin: whether the plugin is installed.
        trains: ``all``, or which layers' chosen experts: ``every layer``, ``last quarter``.
        adapters: which experts have adapters of rank 8, and attention with them, in the place of
            what trains; ``None`` = none.
        by_domain: whether these are those of the domain that all text is of.
    """

    title: str
    plugin: bool
    trains: str
    adapters: str | None = None
    by_domain: bool = False


ARMS = {
    "adapters-chosen": Arm("adapters: chosen, attention", True, "every layer", "selected"),
    "adapters-all": Arm("adapters: experts, attention", True, "every layer", "all"),
    "adapters-by-domain": Arm("the same, by domain", True, "every layer", "all", by_domain=True),
    "stock-all": Arm("stock, everything", False, "all"),
    "all": Arm("plugin, everything", True, "all"),
    "every-layer": Arm("plugin, chosen, every layer", True, "every layer"),
    "last-quarter": Arm("plugin, chosen, last quarter", True, "last quarter"),
    "stock-every-layer": Arm("stock flags, every layer", False, "every layer"),
    "stock-last-quarter": Arm("stock flags, last quarter", False, "last quarter"),
}
RECIPE = """
domains:
  - {{name: all, data: [0]{experts}}}
objective: {{alpha: 0.0, beta: 1.0}}
train: {{experts: {which}{rest}}}
"""
ADAPTED = ", adapters: [{{targets: [experts, attention], experts: {experts}, rank: 8{by}}}]"
EVERYTHING = "".join(
    f", {name}: true" for name in ("router", "attention", "norms", "embedding", "output_layer")
)


def chosen(arm: Arm, options: argparse.Namespace) -> dict[int, list[int]] | None:
    """Expert ids by layer; they wander, so that layers place them on other ranks."""
    if arm.trains == "all":
        return None
    first = 0 if arm.trains == "every layer" else options.layers - options.layers // 4
    every, count = range(options.chosen), options.experts
    return {i: sorted((i + 3 * j) % count for j in every) for i in range(first, options.layers)}


def model_flags(options: argparse.Namespace) -> list[str]:
    """Flags of every arm."""
    text = (
        f"--num-layers {options.layers} --hidden-size {options.hidden} --num-attention-heads 8 "
        f"--seq-length {options.seq} --max-position-embeddings {options.seq} --mock-data "
        "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
        "--attention-dropout 0 --hidden-dropout 0 --untie-embeddings-and-output-weights "
        f"--tokenizer-type NullTokenizer --vocab-size {options.vocab - 1} --num-workers 0 "
        f"--num-experts {options.experts} --moe-router-topk {options.topk} "
        f"--ffn-hidden-size {options.ffn} --moe-ffn-hidden-size {options.ffn} "
        "--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type none "
        f"--micro-batch-size {options.micro_batch} --global-batch-size {options.global_batch} "
        f"--train-iters {options.warm_up + options.steps} --lr 1e-4 --eval-interval 100000 "
        "--eval-iters 0 --log-interval 1000 --distributed-timeout-minutes 60 "
    )
    return text.split() + shlex.split(options.flags)


def start(name: str, layout: str, port: int, options: argparse.Namespace, folder: Path) -> Running:
    """Start the processes of an arm; each tells ``port`` who it is."""
    arm = ARMS[name]
    experts = chosen(arm, options)
    nproc, extra = LAYOUTS[layout]
    flags = [*model_flags(options), *extra.split()]
    if arm.plugin:
        recipe = folder / f"{name}.yaml"
        by_layer = "" if experts is None else f", experts: {{layers: {experts}}}"
        which, rest = ("all", EVERYTHING) if experts is None else ("selected", "")
        if arm.adapters is not None:
            which, rest = (
                "none",
                ADAPTED.format(experts=arm.adapters, by=", by: domain" if arm.by_domain else ""),
            )
        recipe.write_text(RECIPE.format(experts=by_layer, which=which, rest=rest))
        flags = [*(["--cpu"] if options.cpu else []), *flags, "--inject-recipe", str(recipe)]
        flags += ["--inject-from-scratch"]
    spec = {
        "port": port,
        "arm": name,
        "cpu": options.cpu,
        "plugin": arm.plugin,
        "flags": None if arm.plugin else experts,
        "warm_up": options.warm_up,
        "steps": options.warm_up + options.steps,
    }
    return launch(spec, flags, nproc, options.threads, folder)


def measure(layout: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one layout, one per arm."""
    with tempfile.TemporaryDirectory() as folder:
        arms = take_turns(
            lambda port: {
                name: start(name, layout, port, options, Path(folder)) for name in options.arms
            },
            options.warm_up + options.steps,
            timeout=options.timeout,
            start_timeout=options.start_timeout,
            label=layout,
        )
    return [row(layout, name, arm, options) for name, arm in arms.items()]


def row(layout: str, name: str, running: Running, options: argparse.Namespace) -> dict[str, Any]:
    """What the arm gave, in plain values: times by step, bytes summed over ranks."""
    result: dict[str, Any] = {"layout": layout, "arm": name, "title": ARMS[name].title}
    if running.ended:
        return result | {"ended": running.ended}
    steps = running.steps[options.warm_up :]
    last = steps[-1]
    if not any(rank["grad_norm"] for step in steps for rank in step):
        result["ended"] = "trains nothing, silently: the gradient norm of every step is 0"
        return result
    return result | {
        "seconds": [max(rank["seconds"] for rank in step) for step in steps],
        "cpu_seconds": [sum(rank["cpu"] for rank in step) for step in steps],
        "peak_bytes": max(rank["peak_bytes"] for rank in last),
        **{
            key: sum(rank[key] for rank in last)
            for key in ("trained", "gradient_bytes", "optimizer_bytes")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["single", "ep2", "pp2"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=2)
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--flags", default="", help="more Megatron flags for every arm, quoted")
    parser.add_argument("--threads", type=int, default=1, help="per process")
    parser.add_argument("--timeout", type=float, default=120.0, help="of one step, in seconds")
    parser.add_argument("--start-timeout", type=float, default=400.0, help="in seconds")
    parser.add_argument("--json", type=Path, help="write what was measured there")
    options = parser.parse_args()
    import torch

    options.cpu = not torch.cuda.is_available()
    rows = [row for layout in options.layouts for row in measure(layout, options)]
    tell("freeze_bench.py", options, SIZES, rows, render)


if __name__ == "__main__":
    main()
