"""Which part of an injection gives what: every arm on several domains and seeds, as one command.

    bash examples/study.sh               all that is not done yet, then the table
    bash examples/study.sh --report      table, JSON and picture of what there is
                                         (other --steps or --sequences: files named by them)
    bash examples/study.sh --domains html --seeds 1234 --arms "full, CE"

A finished run is a line of results/runs.jsonl and is never repeated; an interrupted study goes on
with the run that it was in. Domains and seeds go in rounds, the first seed of everything first, so
that an unfinished study is still a comparison. What a run writes is in runs/study (--folder).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import arms
import domains
import tables
from domains import runner

from megatron_moe_inject.evaluation.evaluation_file import read_list
from megatron_moe_inject.evaluation.report.run_file import Start, Step, read_run
from megatron_moe_inject.host import files

RESULTS = Path(__file__).resolve().parent / "results"
SEEDS = (1234, 1, 2)
STEPS, SEQUENCES = SIZE = (150, 8)
HELD_OUT_BATCHES = 20


def key(run: dict) -> tuple:
    """What makes a run another run."""
    return run["domain"], run["arm"], run["seed"], run["steps"], run["sequences"]


def read_runs(path: Path) -> list[dict]:
    """The finished runs of a list; a line that was only begun is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in files.whole_lines(path.read_text())]


def open_runs(finished: list[dict], options: argparse.Namespace) -> list[tuple]:
    """(domain, arm, seed, steps, sequences) of what is asked for and not finished, in order."""
    done = {key(run) for run in finished}
    wanted = [
        (domain, arm, seed, options.steps, options.sequences)
        for seed in options.seeds
        for domain in options.domains
        for arm in options.arms
    ]
    return [run for run in wanted if run not in done]


def train(domain: str, arm: arms.Arm, seed: int, folder: Path, options) -> dict:
    """Trains one arm from the untouched student; the numbers of the run."""
    work = folder / f"{re.sub(r'[^a-z0-9]+', '-', arm.name.lower()).strip('-')}-{seed}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    recipe, saved, data = work / "recipe.yaml", work / "injected", folder / "data"
    recipe.write_text(json.dumps(arms.recipe(arm, domain, folder, seed), indent=1))
    student, experts = domains.grown(domain, folder, arm.grown)
    blend = [f"{data}/{domain}_slice", *([f"{data}/english_slice"] if arm.mixed else [])]
    runner.megatron(
        work / "train.log",
        *runner.flags("STUDENT", "BOTH", "TRAINING"),
        *("--inject-recipe", str(recipe), "--inject-verify-frozen"),
        *("--global-batch-size", str(options.sequences), "--micro-batch-size", "8"),
        *("--train-data-path", *blend),
        *("--valid-data-path", "0.5", f"{data}/{domain}_held_out"),
        *("0.5", f"{data}/english_held_out", "--data-cache-path", str(work / "cache")),
        *("--train-iters", str(options.steps), "--lr", str(arm.rate), "--min-lr", "1e-4"),
        *("--eval-interval", str(arms.evaluation_interval(arm, options.steps))),
        *("--eval-iters", str(HELD_OUT_BATCHES), "--seed", str(seed)),
        *("--load", str(student), "--finetune", "--no-load-optim", "--no-load-rng"),
        *("--num-experts", str(experts)),
        *("--save", str(saved), "--save-interval", str(options.steps), "--no-save-optim"),
    )
    found = numbers(saved, domain)
    shutil.rmtree(work / "cache")
    for checkpoint in [*saved.glob("iter_*"), saved / "inject_original"]:
        shutil.rmtree(checkpoint, ignore_errors=True)
    return {
        **{"domain": domain, "arm": arm.name, "seed": seed},
        **{"steps": options.steps, "sequences": options.sequences, **found},
    }


def numbers(saved: Path, domain: str) -> dict:
    """What a run wrote about itself: held-out text at each evaluation, parameters, time."""
    evaluations = read_list(saved / "inject_evaluation.jsonl")
    lines = read_run(saved / "inject_run.jsonl")
    start = next(line for line in lines if isinstance(line, Start))
    steps = [line for line in lines if isinstance(line, Step)]
    general = [e.classes["general"].summary()["bits_per_byte"] for e in evaluations]
    summaries = [e.classes[domain].summary() for e in evaluations]
    teacher, loss = summaries[0]["teacher_loss"], summaries[0]["loss"]
    bits = [summary["bits_per_byte"] for summary in summaries]
    return {
        "iterations": [e.provenance.iteration for e in evaluations],
        "domain_bits": [round(value, 5) for value in bits],
        "general_bits": [round(value, 5) for value in general],
        "teacher_bits": None if teacher is None else round(bits[0] * teacher / loss, 5),
        "text": evaluations[0].text(),
        "new_share": {
            name.partition("/")[2]: round(value, 4)
            for name, value in (steps[-1].terms if steps else {}).items()
            if name.startswith("new share/") and value is not None
        },
        "trained": sum(part.trained for part in start.parameters),
        "parameters": sum(part.trained + part.frozen for part in start.parameters),
        "step_seconds": round(
            sum(s.seconds * s.steps for s in steps) / sum(s.steps for s in steps), 4
        ),
        "versions": {
            name: start.versions[name].partition("+")[0] for name in sorted(start.versions)
        },
    }


def report(finished: list[dict], options: argparse.Namespace, results: Path) -> str:
    """Writes table, JSON and picture of the runs of one size, named by it; returns the table."""
    size = (options.steps, options.sequences)
    runs = [run for run in finished if (run["steps"], run["sequences"]) == size]
    if not runs:
        raise SystemExit(f"no finished run of {size[0]} steps of {size[1]} sequences")
    rows = tables.summary(runs)
    aims = tables.aims(rows)
    text = tables.markdown(rows, aims)
    stem = "study" if size == SIZE else f"study-{size[0]}x{size[1]}"
    files.replace_file(results / f"{stem}.md", text.encode())
    described = json.dumps({"rows": rows, "aims": aims}, indent=1) + "\n"
    files.replace_file(results / f"{stem}.json", described.encode())
    tables.draw(rows, results / f"{stem}.png")
    return text


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(arms.BY_NAME)
    parser.add_argument("--domains", nargs="+", default=list(domains.DOMAINS), metavar="DOMAIN")
    parser.add_argument("--arms", nargs="+", default=names, choices=names, metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--sequences", type=int, default=SEQUENCES, help="of a step, 256 tokens each"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/study"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--from-scratch", action="store_true", help="pretrain the teachers first")
    options = parser.parse_args(arguments)
    for name in options.domains:
        if name not in domains.DOMAINS:
            parser.error(f"--domains: {name!r} is none of {', '.join(domains.DOMAINS)}")
    return options


def main() -> None:
    options = parse()
    folder = options.folder.absolute()
    path = options.results / "runs.jsonl"
    options.results.mkdir(parents=True, exist_ok=True)
    if not options.report:
        if path.exists():  # a line that was only begun is cut off, so that the next one is whole
            files.replace_file(path, "".join(files.whole_lines(path.read_text())).encode())
        if options.from_scratch:
            for name in options.domains:
                domains.pretrain(domains.DOMAINS[name], folder / name)
        for domain, arm, seed, *_ in open_runs(read_runs(path), options):
            domains.prepare(domains.DOMAINS[domain], folder / domain)
            run = train(domain, arms.BY_NAME[arm], seed, folder / domain, options)
            files.append_line(path, (json.dumps(run) + "\n").encode())
            print(tables.one_line(run), flush=True)
            report(read_runs(path), options, options.results)
    print(report(read_runs(path), options, options.results))


if __name__ == "__main__":
    main()
