"""The quickstart into whole experts, in six precisions on a GPU: the same curves, the same gain?

    bash examples/quickstart.sh       first, anywhere: student, teacher, data and profile
    python examples/benchmarks/gpu/precision_curves.py runs/quickstart [--json FILE] [--plot FILE]

All runs start at once, on one GPU: fp32 with Megatron's local layers, the others under Transformer
Engine with grouped GEMM. The figures are of the run's own evaluations of held-out text, before the
first step and after the last. Times are not comparable, since the runs share the GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "quickstart")]

from runner import WHOLE_EXPERTS, flags  # noqa: E402

from megatron_moe_inject.evaluation.evaluation_file import read_list  # noqa: E402

TE = "--transformer-impl transformer_engine --moe-grouped-gemm --bf16 --attention-backend unfused"
LOCAL = "--transformer-impl local --no-persist-layer-norm"
FP8 = "--fp8-format e4m3 --fp8-recipe blockwise"
FROZEN, TAUGHT = "train.frozen_experts=fp8", "teachers.coder.fp8=tensorwise"
ARMS = {  # title -> flags, fields of the recipe
    "fp32": (LOCAL, ()),
    "bf16": (TE, ()),
    "FP8 blockwise": (f"{TE} {FP8}", ()),
    "FP8 tensorwise": (f"{TE} --fp8-format hybrid --fp8-recipe tensorwise", ()),
    "FP8, frozen experts in FP8 alone": (f"{TE} {FP8}", (FROZEN,)),
    "FP8, frozen experts and teacher in FP8": (f"{TE} {FP8}", (FROZEN, TAUGHT)),
}
TERMS = ("lm loss", "kd loss", "retention loss", "grad norm")


def start(arm: str, folder: Path, work: Path, steps: int) -> subprocess.Popen:
    own, fields = ARMS[arm]
    data = folder / "data"
    sets = [
        f"teachers.coder.source=megatron:{folder}/teacher",
        f"domains[0].experts.profile={folder}/profile.json",
        f"evaluation.file={work}/evaluation.jsonl",
        *WHOLE_EXPERTS,
        *fields,
    ]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"),
        *("-m", "megatron_moe_inject.pretrain", *flags("STUDENT", "BOTH", "TRAINING")),
        *shlex.split(own),
        "--no-gradient-accumulation-fusion",
        *("--inject-recipe", str(HERE.parents[1] / "quickstart" / "recipe.yaml")),
        *("--inject-verify-frozen", "--inject-set", *sets),
        *("--train-data-path", "0.9", f"{data}/code_slice", "0.1", f"{data}/english_slice"),
        *("--valid-data-path", "0.5", f"{data}/code_held_out", "0.5", f"{data}/english_held_out"),
        *("--data-cache-path", str(work / "cache"), "--train-iters", str(steps)),
        *("--lr", "1e-3", "--min-lr", "1e-4", "--eval-interval", str(steps), "--eval-iters", "10"),
        *("--load", str(folder / "student"), "--finetune", "--no-load-optim", "--no-load-rng"),
    ]
    work.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (work / "log").open("wb") as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=out)


def read_log(log: Path) -> dict[str, Any]:
    """Curves by term, None where a line has none, and whether what is frozen was proved."""
    text = log.read_text(errors="replace")
    curves: dict[str, list[float | None]] = {name: [] for name in ("iteration", *TERMS)}
    for iteration, line in re.findall(r"iteration\s+(\d+)/\s*\d+ (\|.*)", text):
        curves["iteration"].append(int(iteration))
        for term in TERMS:
            found = re.search(rf"\| {term}: ([-+.\dE]+|nan|inf) ", line)
            curves[term].append(float(found[1]) if found else None)
    return {"curves": curves, "proved": "bitwise unchanged" in text}


def result(work: Path) -> dict[str, Any]:
    """What its log tells, and held-out numbers before and after, of a run that ended well."""
    first, *_, last = read_list(work / "evaluation.jsonl")
    held_out = {
        name: {
            "before": first.classes[name].summary()["bits_per_byte"],
            "after": last.classes[name].summary()["bits_per_byte"],
        }
        for name in first.classes
    }
    return read_log(work / "log") | {"held_out": held_out}


def render(results: dict[str, Any]) -> list[str]:
    lines = [
        "| precision | last lm loss | last kd loss | code, bits per byte | English | frozen |",
        "|---|---|---|---|---|---|",
    ]
    for arm, found in results.items():
        if "ended" in found:
            lines.append(f"| {arm} | {found['ended']} | | | | |")
            continue
        cells = [f"{found['curves'][term][-1]:.4f}" for term in TERMS[:2]]
        for name in ("code", "general"):
            bits = found["held_out"][name]
            cells.append(f"{bits['before']:.4f} -> {bits['after']:.4f}")
        cells.append("bitwise unchanged" if found["proved"] else "not proved")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    base = results["fp32"]["curves"] if "curves" in results.get("fp32", {}) else None
    for arm, found in results.items():
        if "ended" in found:
            continue
        curve = found["curves"]["kd loss"]
        at = found["curves"]["iteration"]
        axes[0].plot(at, curve, label=arm, linewidth=1.2)
        if base is not None:
            apart = [a - b for a, b in zip(curve, base["kd loss"], strict=True)]
            axes[1].plot(at, apart, label=arm, linewidth=1.2)
    axes[0].set(xlabel="step", ylabel="kd loss, nats", title="Distillation loss")
    axes[1].set(xlabel="step", ylabel="nats", title="Apart from fp32")
    axes[0].legend(fontsize=7, frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="what the quickstart wrote")
    parser.add_argument("--work", type=Path, default=Path("runs/precision_curves"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--timeout", type=float, default=400.0, help="of all runs, in seconds")
    parser.add_argument("--json", type=Path, help="write the figures")
    parser.add_argument("--plot", type=Path, help="draw the curves")
    options = parser.parse_args()
    import torch

    works = {arm: options.work / re.sub(r"\W+", "-", arm) for arm in options.arms}
    runs = {
        arm: start(arm, options.folder.resolve(), work.resolve(), options.steps)
        for arm, work in works.items()
    }
    results = {}
    for arm, process in runs.items():
        try:
            code = process.wait(options.timeout)
            results[arm] = {"ended": f"exit {code}, see {works[arm]}/log"}
            if not code:
                results[arm] = result(works[arm])
        except subprocess.TimeoutExpired:
            process.kill()
            results[arm] = {"ended": "ran too long"}
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print("\n".join([where, f"{options.steps} steps", "", *render(results)]))
    if options.json:
        whole = {
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", "examples/benchmarks/gpu/precision_curves.py"]),
            "machine": where,
            "steps": options.steps,
            "results": results,
        }
        options.json.write_text(json.dumps(whole, indent=1) + "\n")
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
