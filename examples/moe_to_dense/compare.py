"""A dense student of a mixture of experts, or the other way round: starts and losses compared.

    bash examples/moe_to_dense.sh                               one seed, then the table
    bash examples/moe_to_dense.sh --seeds 3                     as in README.md
    bash examples/moe_to_dense.sh --direction dense_to_moe      a dense teacher, upcycled
    bash examples/moe_to_dense.sh --report                      of the runs that there are

A finished run is a line of results/<direction>.jsonl and is never repeated. Text, models, logs and
results are in runs/moe_to_dense (--folder, --results).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from statistics import fmean, pstdev

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import directions  # noqa: E402
import figures  # noqa: E402
import runner  # noqa: E402

from megatron_moe_inject.host import files  # noqa: E402

SEEDS = (1234, 1, 2)
STEPS = 100
LATEST = "latest_checkpointed_iteration.txt"
COMMAND = ("-m", "megatron_moe_inject.cli")
START = ("--finetune", "--no-load-optim", "--no-load-rng")
COLOURS = ("#8c8c8c", "#56b4e9", "#0072b2", "#e69f00", "#d55e00", "#cc79a7", "#009e73")


class Study:
    """One direction, prepared in a folder.

    Args:
        name: of ``directions.DIRECTIONS``.
        folder: of text, models and logs.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.direction, self.folder = name, directions.DIRECTIONS[name], folder
        self.data, self.teacher = folder / "data", folder / self.direction.teacher

    @property
    def source(self) -> str:
        """The teacher, as a recipe names it."""
        if self.name == "moe_to_dense":
            return f"hf:{self.folder}/exported"
        return f"megatron:{self.teacher}"

    def prepare(self) -> None:
        """Make what is missing: text, the teacher, and the student's start from it."""
        if not (self.data / "manifest.json").exists():
            script = str(QUICKSTART / "corpora.py")
            say("cutting the text")
            runner.logged(self.folder / "text.log", script, str(self.data), "--pretraining")
        if not (self.teacher / LATEST).exists():
            say("unpacking the teacher")
            shutil.rmtree(self.teacher, ignore_errors=True)
            command = (str(QUICKSTART / "models.py"), "unpack", self.teacher.name)
            architecture = runner.flags(self.direction.architecture, "BOTH")
            log = self.folder / f"unpack-{self.teacher.name}.log"
            runner.logged(log, *command, str(self.teacher), "--", *architecture)
        if self.name == "moe_to_dense":
            self._export()
            self._profile()
            profile = ("--profile", str(self.folder / "profile.json"))
            width = ("--ffn-hidden-size", str(directions.WIDTH))
            self._convert("densified", "densify", *width, *profile)
            drawn = self.folder / "drawn"
            if not drawn.exists():
                script = str(HERE / "drawn.py")
                densified = str(self.folder / "densified")
                runner.logged(self.folder / "drawn.log", script, densified, str(drawn))
        else:
            experts = ("--experts", str(directions.EXPERTS), "--topk", str(directions.TOPK))
            parts = ("--granularity", str(directions.GRANULARITY))
            self._convert("upcycled", "upcycle", *experts, *parts)

    def _convert(self, name: str, *command: str) -> None:
        """A student's start from the teacher."""
        output = self.folder / name
        if not output.exists():
            say(f"{command[0]}: {output}")
            subcommand, *options = command
            log = self.folder / f"{subcommand}.log"
            words = (*COMMAND, subcommand, str(self.teacher), "--output", str(output))
            runner.logged(log, *words, *options)

    def _export(self) -> None:
        template, output = self.folder / "template", self.folder / "exported"
        if not output.exists():
            say("exporting the teacher as a Hugging Face folder")
            runner.logged(self.folder / "template.log", str(HERE / "as_mixtral.py"), str(template))
            words = ("--hf", str(template), "--output", str(output))
            runner.logged(
                self.folder / "export.log", *COMMAND, "export-hf", str(self.teacher), *words
            )

    def _profile(self) -> None:
        profile, recipe = self.folder / "profile.json", self.folder / "profile.yaml"
        if profile.exists():
            return
        say("profiling the teacher's routing")
        recipe.write_text(
            "domains: [{name: english, data: [0]}]\n"
            "train: {everything: true}\nobjective: {alpha: 0.0, beta: 1.0}\n"
        )
        runner.logged(
            self.folder / "profile.log",
            *(*COMMAND, "profile", str(recipe), "--cpu", "--output", str(profile), "--"),
            *(*runner.flags("STUDENT"), *self._flags(1234, "cache-profile")),
            *("--valid-data-path", str(self.data / "english_train"), "--train-iters", "1"),
            *("--lr", "1e-3", "--eval-interval", "1", "--eval-iters", "40"),
            *("--load", str(self.teacher), *START),
        )

    def _flags(self, seed: int, cache: str) -> list[str]:
        """Of every run, but for its model and how long it is."""
        return [
            *runner.flags("BOTH", "TRAINING"),
            *("--train-data-path", str(self.data / f"{self.direction.text}_train")),
            *("--data-cache-path", str(self.folder / cache), "--seed", str(seed)),
        ]

    def _held_out(self) -> tuple[str, ...]:
        names = ("--multiple-validation-sets", "--validation-set-names", self.direction.text)
        path = str(self.data / f"{self.direction.text}_held_out")
        return ("--full-validation", *names, "--valid-data-path", path)

    def model(self, start: str) -> tuple[list[str], Path | None]:
        """Flags and checkpoint of a start."""
        if start == directions.SCRATCH:
            return list(directions.DENSE), None
        if start in (directions.DENSIFIED, directions.DRAWN):
            name = "densified" if start == directions.DENSIFIED else "drawn"
            return list(directions.DENSE), self.folder / name
        dense = runner.flags(self.direction.architecture)
        if start == directions.ITSELF:
            return dense, self.teacher
        width = int(dense[dense.index("--ffn-hidden-size") + 1]) // directions.GRANULARITY
        experts = (
            "--num-experts",
            str(directions.EXPERTS),
            "--moe-router-topk",
            str(directions.TOPK),
        )
        sizes = ("--moe-ffn-hidden-size", str(width))
        return [*dense, *experts, *sizes, *directions.ROUTER], self.folder / "upcycled"

    def measure(self, model: list[str], checkpoint: Path) -> float:
        """Bits per byte of a checkpoint on the held-out text, whole; once for a folder."""
        log = self.folder / f"measured-{checkpoint.name}.log"
        if not log.exists() or not figures.read_log(log).validation:
            steps = ("--train-iters", "1", "--lr", "1e-3", "--eval-interval", "1", "--skip-train")
            run = (*self._flags(1234, "cache-measure"), *self._held_out(), *steps)
            runner.megatron(log, *model, *run, "--load", str(checkpoint), *START)
        return self._bits(figures.read_log(log))[-1][1]

    def _bits(self, run: figures.Run) -> figures.Series:
        sizes = json.loads((self.data / "manifest.json").read_text())
        held_out = sizes[f"{self.direction.text}_held_out"]
        losses = run.validation[f"lm loss/{self.direction.text}"]
        return [(step, figures.bits_per_byte(loss, held_out)) for step, loss in losses]

    def train(self, start: str, by: str, seed: int, steps: int) -> dict:
        """Train one arm; what it gave."""
        model, checkpoint = self.model(start)
        name = re.sub(r"[^a-z0-9]+", "-", f"{self.name} {start} {by} {seed} {steps}".lower())
        work = self.folder / name
        work.mkdir(exist_ok=True)
        recipe = work / "recipe.json"
        made = directions.recipe(self.direction, by, str(self.data), self.source, steps)
        recipe.write_text(json.dumps(made, indent=1))
        begin = ("--inject-from-scratch",)
        if checkpoint is not None:
            begin = ("--load", str(checkpoint), *START)
        rate = self.direction.rates[start]
        runner.megatron(
            work / "train.log",
            *(*model, *self._flags(seed, f"{name}/cache"), *self._held_out(), *begin),
            *("--inject-recipe", str(recipe), "--train-iters", str(steps)),
            *("--lr", str(rate), "--min-lr", str(rate / 10)),
            *("--eval-interval", str(max(1, steps // 4))),
        )
        shutil.rmtree(work / "cache", ignore_errors=True)
        run = figures.read_log(work / "train.log")
        bits = [[step, round(value, 5)] for step, value in self._bits(run)]
        if checkpoint is not None:
            bits.insert(0, [0, round(self.measure(model, checkpoint), 5)])
        times = [value for _, value in run.terms["elapsed time per iteration (ms)"]]
        return {
            **{"start": start, "by": by, "seed": seed, "steps": steps, "bits": bits},
            "step_milliseconds": round(fmean(times[1:] or times)),
        }


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def read_runs(path: Path) -> list[dict]:
    """The finished runs of a list."""
    if not path.exists():
        return []
    return [json.loads(line) for line in files.whole_lines(path.read_text())]


def spread(values: list[float]) -> str:
    """Mean, and the standard deviation between seeds where there are several."""
    return f"{fmean(values):.3f}" + (f" ± {pstdev(values):.3f}" if len(values) > 1 else "")


def table(name: str, runs: list[dict], teacher: float) -> str:
    """Bits per byte on held-out text, by arm."""
    lines = [
        "| start | learns from | before | after a quarter | at the end | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for start, by in directions.DIRECTIONS[name].arms:
        found = [run["bits"] for run in runs if (run["start"], run["by"]) == (start, by)]
        if found:
            before = spread([bits[0][1] for bits in found]) if found[0][0][0] == 0 else "-"
            quarter = spread([next(value for step, value in bits if step) for bits in found])
            end = spread([bits[-1][1] for bits in found])
            lines.append(f"| {start} | {by} | {before} | {quarter} | {end} | {len(found)} |")
    return "\n".join([*lines, f"| the teacher | | {teacher:.3f} | | | |"])


def draw(name: str, runs: list[dict], teacher: float, path: Path) -> None:
    """Bits per byte by step, the mean of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for (start, by), colour in zip(directions.DIRECTIONS[name].arms, COLOURS, strict=False):
        found = [run["bits"] for run in runs if (run["start"], run["by"]) == (start, by)]
        if found:
            steps = [step for step, _ in found[0]]
            means = [fmean(bits[at][1] for bits in found) for at in range(len(steps))]
            panel.plot(steps, means, marker="o", color=colour, label=f"{start}, {by}")
    panel.axhline(teacher, color="black", linestyle="--", label="the teacher")
    panel.set(xlabel="step", ylabel="bits per byte on held-out text")
    panel.legend(fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--direction", choices=list(directions.DIRECTIONS), default="moe_to_dense")
    parser.add_argument("--seeds", type=int, default=1, help="how many, of 3")
    parser.add_argument("--steps", type=int, default=STEPS, help="of 4,096 tokens")
    parser.add_argument("--folder", type=Path, default=Path("runs/moe_to_dense"))
    parser.add_argument("--results", type=Path, help="default: results in --folder")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    if not 1 <= options.seeds <= len(SEEDS):
        parser.error(f"--seeds: {options.seeds} is none of 1 to {len(SEEDS)}")
    return options


def main() -> None:
    options = parse()
    folder, name = options.folder.absolute(), options.direction
    results = options.results or folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    listed, study = results / f"{name}.jsonl", Study(name, folder)
    reference = results / f"{name}-teacher.json"
    if not options.report:
        folder.mkdir(parents=True, exist_ok=True)
        study.prepare()
        model = runner.flags(study.direction.architecture)
        bits = {"bits_per_byte": round(study.measure(model, study.teacher), 5)}
        files.replace_file(reference, (json.dumps(bits) + "\n").encode())
        done = {(r["start"], r["by"], r["seed"], r["steps"]) for r in read_runs(listed)}
        for seed in SEEDS[: options.seeds]:
            for start, by in study.direction.arms:
                if (start, by, seed, options.steps) not in done:
                    run = study.train(start, by, seed, options.steps)
                    files.append_line(listed, (json.dumps(run) + "\n").encode())
                    say(f"{start}, {by}, seed {seed}: {run['bits'][-1][1]:.3f} bits per byte")
    runs = [run for run in read_runs(listed) if run["steps"] == options.steps]
    teacher = json.loads(reference.read_text())["bits_per_byte"]
    text = table(name, runs, teacher)
    files.replace_file(results / f"{name}.md", (text + "\n").encode())
    draw(name, runs, teacher, results / f"{name}.png")
    print(text)


if __name__ == "__main__":
    main()
