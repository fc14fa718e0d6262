"""What steering is worth on the quickstart's student: gain, forgetting and target share, by arm.

    bash examples/quickstart.sh                       first: student, teacher, data and profile
    python examples/benchmarks/steering_study.py runs/quickstart [--seeds 1234 1 2] [--steps 200]
    python examples/benchmarks/steering_study.py runs/quickstart --report results/steering \\
        [--earlier results/2026-11-22-steering.json]

Each arm is the quickstart's injection on one process with other settings of ``train`` and
``steering``; held-out text is evaluated whole, before and after. A run that is done is not
repeated, so an interrupted study goes on. ``--report`` writes the table and the picture of what
there is, each run with its date and machine, beside the runs of an earlier report of as many steps.
A run of both reports counts once, as the newer, and how far they are apart is printed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import figures  # noqa: E402
from runner import WHOLE_EXPERTS, flags, megatron  # noqa: E402

GENTLE = ("steering.coeff=0.01",)
RETAINED = (*GENTLE, "steering.retention=1.0")
ARMS = {
    "no steering, router frozen": (),
    "no steering, router trains": ("train.router=true",),
    "no steering, router held": ("train.router=true", "steering.retention=1.0"),
    "0.01, router frozen": GENTLE,
    "0.01, target rows": ("train.router_rows=true", *RETAINED),
    "0.01, router": ("train.router=true", *RETAINED),
    "0.1, router": ("train.router=true", "steering.coeff=0.1", "steering.retention=1.0"),
    "0.1 to 0.8, router": (
        *("train.router=true", "steering.coeff=0.1", "steering.target_mass=0.8"),
        "steering.retention=1.0",
    ),
}
SETS = ("code", "english")
NUMBERS = ("gain", "forgotten", "share", "general", "within", "dead")


def held_out(folder: Path, checkpoint: Path, log: Path, cache: Path) -> dict[str, float]:
    """Bits per byte of a student on the whole held-out text, by set."""
    data = folder / "data"
    megatron(
        log,
        *flags("STUDENT", "BOTH", "TRAINING", "HELD_OUT"),
        *("--train-data-path", f"{data}/code_slice", "--valid-data-path"),
        *(f"{data}/{name}_held_out" for name in SETS),
        *("--data-cache-path", str(cache), "--train-iters", "1", "--lr", "1e-3"),
        *("--eval-interval", "1", "--load", str(checkpoint), "--finetune", "--no-load-optim"),
        *("--no-load-rng", "--skip-train"),
    )
    manifest = json.loads((data / "manifest.json").read_text())
    losses = figures.read_log(log).validation
    return {
        name: figures.bits_per_byte(losses[f"lm loss/{name}"][-1][1], manifest[f"{name}_held_out"])
        for name in SETS
    }


def last_details(folder: Path) -> dict[str, float]:
    """Means over layers of what was last written by layer to TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    values: dict[str, list[float]] = {}
    for tag in events.Tags()["scalars"]:
        if tag.startswith("inject-routing/code/"):
            values.setdefault(tag.split("/")[2], []).append(events.Scalars(tag)[-1].value)
    return {name: statistics.mean(found) for name, found in values.items()}


def run_arm(folder: Path, work: Path, arm: str, seed: int, steps: int) -> dict:
    """Inject and evaluate; the numbers of one run."""
    work.mkdir(parents=True, exist_ok=True)
    data, saved = folder / "data", work / "injected"
    shutil.rmtree(saved, ignore_errors=True)  # an arm that is run again begins anew
    sets = [
        f"teachers.coder.source=megatron:{folder}/teacher",
        f"domains[0].experts.profile={folder}/profile.json",
        *("steering.report=true", f"steering.detail_every={steps}"),
        *WHOLE_EXPERTS,
        *ARMS[arm],
    ]
    megatron(
        work / "inject.log",
        *flags("STUDENT", "BOTH", "TRAINING"),
        *("--inject-recipe", str(QUICKSTART / "recipe.yaml"), "--inject-set", *sets),
        *("--train-data-path", "0.9", f"{data}/code_slice", "0.1", f"{data}/english_slice"),
        *("--valid-data-path", "0.5", f"{data}/code_held_out", "0.5", f"{data}/english_held_out"),
        *("--data-cache-path", str(work / "cache"), "--train-iters", str(steps)),
        *("--lr", "1e-3", "--min-lr", "1e-4", "--eval-interval", str(steps), "--eval-iters", "10"),
        *("--load", str(folder / "student"), "--finetune", "--no-load-optim", "--no-load-rng"),
        *("--save", str(saved), "--save-interval", str(steps), "--seed", str(seed)),
        *("--tensorboard-dir", str(work / "tensorboard")),
    )
    run = figures.read_log(work / "inject.log")
    return {
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "machine": machine(),
        "held_out": held_out(folder, saved, work / "after.log", work / "cache-after"),
        "validation": {name: series[-1][1] for name, series in run.validation.items()},
        "details": last_details(work / "tensorboard"),
    }


def machine() -> str:
    """Processor and versions, in words."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    processor = found[1] if found else platform.machine()
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "megatron-core"))
    return ", ".join((f"{processor} ({os.cpu_count()} cores)", *versions))


def run_numbers(result: dict, before: dict[str, float]) -> dict:
    """What a report keeps of a run, see ``NUMBERS``."""
    details, validation = result["details"], result["validation"]
    return {name: result[name] for name in ("arm", "seed", "steps", "date", "machine")} | {
        "gain": before["code"] - result["held_out"]["code"],
        "forgotten": result["held_out"]["english"] - before["english"],
        "share": validation["target share/code"],
        "general": validation["general on targets/code"],
        "within": details["balance within"],
        "dead": details["dead within"] + details["dead outside"],
    }


def earlier_runs(path: Path, steps: int) -> list[dict]:
    """The runs of an earlier report, of as many steps.

    The first report has one list by arm and number, and neither steps (200), machine nor seeds,
    which were run in the order 1234, 1, 2.
    """
    stored = json.loads(path.read_text())
    if isinstance(stored, dict):
        return [run for run in stored["runs"] if run["steps"] == steps]
    date = re.match(r"\d{4}-\d\d-\d\d", path.name)
    known = {"steps": 200, "date": date[0] if date else None, "machine": None}
    runs = [
        {"arm": row["arm"], "seed": seed, **known, **{n: row[n][i] for n in NUMBERS}}
        for row in stored
        for i, seed in enumerate([1234, 1, 2][: row["seeds"]])
    ]
    return [run for run in runs if run["steps"] == steps]


def combined(runs: list[dict], earlier: list[dict]) -> tuple[list[dict], list[str]]:
    """All runs, those of both once, as the newer; and how far the two are apart, in words."""
    again = {(run["arm"], run["seed"]): run for run in runs}
    said = []
    for old in earlier:
        new = again.get((old["arm"], old["seed"]))
        if new is not None:
            apart = ", ".join(f"{n} {old[n]:.4f} and {new[n]:.4f}" for n in NUMBERS[:3])
            said.append(f"{old['arm']}, seed {old['seed']}, {old['date']} and again: {apart}")
    kept = [old for old in earlier if (old["arm"], old["seed"]) not in again]
    return [*kept, *runs], said


def summary(runs: list[dict]) -> list[dict]:
    """One row per arm: its numbers by seed."""
    rows = []
    for arm in ARMS:
        found = [run for run in runs if run["arm"] == arm]
        if found:
            numbers = {name: [run[name] for run in found] for name in NUMBERS}
            rows.append({"arm": arm, "seeds": len(found), **numbers})
    return rows


def mean_and_spread(values: list[float], digits: int = 3) -> str:
    """ "0.257 (0.255-0.259)": mean, least and greatest."""
    spread = f"{min(values):.{digits}f}-{max(values):.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ({spread})"


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = [
        "| steering | seeds | gain on code, bits per byte | English forgotten | code's choices on "
        "targets | English's | balance within targets | dead experts per layer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["arm"], str(row["seeds"])]
        cells += [mean_and_spread(row[name]) for name in ("gain", "forgotten")]
        cells += [f"{100 * statistics.mean(row[name]):.1f} %" for name in ("share", "general")]
        cells += [f"{statistics.mean(row['within']):.3f}", f"{statistics.mean(row['dead']):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Gain against forgetting, every seed a point; and where the tokens go."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (plane, shares) = pyplot.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    colours = pyplot.get_cmap("tab10")
    for index, row in enumerate(rows):
        plane.scatter(row["forgotten"], row["gain"], color=colours(index), label=row["arm"])
    plane.set(xlabel="English forgotten, bits per byte", ylabel="gain on code, bits per byte")
    plane.legend(fontsize=7)
    places = range(len(rows))
    for offset, name, label in ((-0.2, "share", "code"), (0.2, "general", "English")):
        values = [100 * statistics.mean(row[name]) for row in rows]
        shares.barh([p + offset for p in places], values, 0.38, label=label)
    shares.set_yticks(places, [row["arm"] for row in rows], fontsize=7)
    shares.invert_yaxis()
    shares.set(xlabel="choices that go to the target experts, %")
    shares.legend(fontsize=7)
    for panel in (plane, shares):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def write_report(runs: list[dict], earlier: list[dict], path: Path) -> None:
    """The runs as PATH.json, their table as PATH.md and their picture as PATH.png."""
    runs, said = combined(runs, earlier)
    rows = summary(runs)
    path.with_suffix(".json").write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(rows) + "\n")
    draw(rows, path.with_suffix(".png"))
    print(table(rows), *said, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a finished run of quickstart.sh")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--report", type=Path, help="write REPORT.json, .md and .png, run nothing")
    parser.add_argument("--earlier", type=Path, help="JSON of an earlier report, to go beside")
    options = parser.parse_args()
    if options.earlier is not None and options.report is None:
        parser.error("--earlier goes with --report")
    results_path = options.folder / "steering" / "results.jsonl"
    results_path.parent.mkdir(exist_ok=True)
    results = []
    if results_path.exists():
        results = [json.loads(line) for line in results_path.read_text().splitlines()]
    before = json.loads((options.folder / "result.json").read_text())["bits_per_byte"]["before"]
    if options.report is not None:
        runs = [run_numbers(r, before) for r in results if r["steps"] == options.steps]
        earlier = earlier_runs(options.earlier, options.steps) if options.earlier else []
        write_report(runs, earlier, options.report)
        return
    done = {(r["arm"], r["seed"], r["steps"]) for r in results}
    for seed in options.seeds:
        for arm in options.arms:
            if (arm, seed, options.steps) in done:
                continue
            work = options.folder / "steering" / f"{list(ARMS).index(arm)}-{seed}-{options.steps}"
            result = run_arm(options.folder.absolute(), work.absolute(), arm, seed, options.steps)
            with results_path.open("a") as file:
                file.write(json.dumps(result) + "\n")
            gain = before["code"] - result["held_out"]["code"]
            lost = result["held_out"]["english"] - before["english"]
            print(f"{arm}, seed {seed}: gain {gain:.3f}, forgotten {lost:+.3f}", flush=True)


if __name__ == "__main__":
    main()
