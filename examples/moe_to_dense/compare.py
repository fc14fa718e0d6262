"""A dense student of a mixture of experts, or the other way round: starts and losses compared.

    bash examples/moe_to_dense.sh                               one seed, then the table
    bash examples/moe_to_dense.sh --seeds 3                     as in README.md
    bash examples/moe_to_dense.sh --direction dense_to_moe      a weaker dense model, upcycled
    bash examples/moe_to_dense.sh --direction densify           what densify's options give
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
LATEST = "latest_checkpointed_iteration.txt"
COMMAND = ("-m", "megatron_moe_inject.cli")
START = ("--finetune", "--no-load-optim", "--no-load-rng")
COLOURS = (
    *("#7f7f7f", "#0072b2", "#d55e00", "#cc79a7"),
    *("#4d4d4d", "#56b4e9", "#e69f00", "#882255", "#009e73"),
)
LINES = ("--", "-", "-.", ":")
"""By start; colours are by arm."""


class Study:
    """One direction, prepared in a folder.

    Args:
        name: of ``directions.DIRECTIONS``.
        folder: of text, models and logs.
        processes: of a run, over which a teacher's experts are spread.
    """

    def __init__(self, name: str, folder: Path, processes: int = 1) -> None:
        self.name, self.direction, self.folder = name, directions.DIRECTIONS[name], folder
        self.processes = processes
        self.data, self.teacher = folder / "data", folder / self.direction.teacher

    @property
    def source(self) -> str:
        """The teacher, as a recipe names it."""
        return f"megatron:{self.teacher}"

    def prepare(self) -> None:
        """Make what is missing: text, the teacher, and what students' starts are made with."""
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
        if self.direction.experts:
            self._profile()
        else:
            self._small()

    def _small(self) -> None:
        """The weaker dense model, trained from random weights on the text that students learn."""
        small = self.folder / "small"
        if (small / LATEST).exists():
            return
        say(f"training the dense model that becomes a mixture: {directions.SMALL_STEPS} steps")
        shutil.rmtree(small, ignore_errors=True)
        recipe = self.folder / "small.json"
        made = directions.recipe(self.direction, directions.CE, str(self.data), "", 1)
        recipe.write_text(json.dumps(made))
        steps = str(directions.SMALL_STEPS)
        length = (*self._held_out(), "--train-iters", steps, "--eval-interval", steps)
        saving = ("--save", str(small), "--save-interval", steps, "--no-save-optim")
        self._megatron(
            self.folder / "small.log",
            *(*directions.SMALL, *self._flags(1234, "cache-small"), *length, *saving),
            *self._rate(directions.SMALL_RATE),
            *("--inject-from-scratch", "--inject-recipe", str(recipe)),
        )

    def _converted(self, name: str, command: str, *options: str) -> Path:
        """A student's start from another checkpoint, made where it is missing."""
        output = self.folder / name
        if not output.exists():
            say(f"{command}: {output}")
            origin = self.teacher if self.direction.experts else self.folder / "small"
            words = (*COMMAND, command, str(origin), "--output", str(output), *options)
            runner.logged(self.folder / f"{name}.log", *words)
        return output

    def _densified(self, start: str) -> Path:
        name = "densified"
        if start != directions.DENSIFIED:
            name = slug(f"densified {start}")
        profile = ("--profile", str(self.folder / "profile.json"))
        width = ("--ffn-hidden-size", str(directions.WIDTH))
        return self._converted(name, "densify", *width, *profile, *directions.DENSIFY[start])

    def _drawn(self) -> Path:
        drawn = self.folder / "drawn"
        if not drawn.exists():
            densified = str(self._densified(directions.DENSIFIED))
            script = str(HERE / "drawn.py")
            runner.logged(self.folder / "drawn.log", script, densified, str(drawn))
        return drawn

    def _upcycled(self) -> Path:
        return self._converted(
            *("upcycled", "upcycle", "--experts", str(directions.EXPERTS)),
            *("--topk", str(directions.TOPK), "--granularity", str(directions.GRANULARITY)),
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

    def _megatron(self, log: Path, *arguments: str) -> None:
        runner.megatron(log, *arguments, processes=self.processes)

    @staticmethod
    def _rate(peak: float) -> tuple[str, ...]:
        return ("--lr", str(peak), "--min-lr", str(peak / 10))

    def model(self, start: str) -> tuple[list[str], Path | None]:
        """Flags and checkpoint of a start, which is made where it is missing."""
        if start == directions.SCRATCH:
            return list(directions.DENSE), None
        if start in directions.DENSIFY:
            return list(directions.DENSE), self._densified(start)
        if start == directions.DRAWN:
            return list(directions.DENSE), self._drawn()
        small = list(directions.SMALL)
        if start == directions.SMALL_ON:
            return small, self.folder / "small"
        width = int(small[small.index("--ffn-hidden-size") + 1]) // directions.GRANULARITY
        experts = ("--num-experts", str(directions.EXPERTS))
        chosen = ("--moe-router-topk", str(directions.TOPK), "--moe-ffn-hidden-size", str(width))
        return [*small, *experts, *chosen, *directions.ROUTER], self._upcycled()

    def measure(self, model: list[str], checkpoint: Path) -> float:
        """Bits per byte of a checkpoint on the held-out text, whole; once for a folder."""
        log = self.folder / f"measured-{checkpoint.name}.log"
        if not log.exists() or not figures.read_log(log).validation:
            steps = ("--train-iters", "1", "--lr", "1e-3", "--eval-interval", "1", "--skip-train")
            run = (*self._flags(1234, "cache-measure"), *self._held_out(), *steps)
            self._megatron(log, *model, *run, "--load", str(checkpoint), *START)
        return self._bits(figures.read_log(log))[-1][1]

    def _bits(self, run: figures.Run) -> figures.Series:
        sizes = json.loads((self.data / "manifest.json").read_text())
        held_out = sizes[f"{self.direction.text}_held_out"]
        losses = run.validation[f"lm loss/{self.direction.text}"]
        return [(step, figures.bits_per_byte(loss, held_out)) for step, loss in losses]

    def train(self, start: str, by: str, seed: int, steps: int) -> dict:
        """Train one arm; what it gave."""
        model, checkpoint = self.model(start)
        name = slug(f"{self.name} {start} {by} {seed} {steps}")
        work = self.folder / name
        work.mkdir(exist_ok=True)
        recipe = work / "recipe.json"
        words = (by, str(self.data), self.source, steps, self.processes)
        made = directions.recipe(self.direction, *words)
        recipe.write_text(json.dumps(made, indent=1))
        begin = ("--inject-from-scratch",)
        if checkpoint is not None:
            begin = ("--load", str(checkpoint), *START)
        self._megatron(
            work / "train.log",
            *(*model, *self._flags(seed, f"{name}/cache"), *self._held_out(), *begin),
            *("--inject-recipe", str(recipe), "--train-iters", str(steps)),
            *self._rate(self.direction.rate),
            *("--eval-interval", str(max(1, steps // self.direction.evaluations))),
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


def slug(text: str) -> str:
    """The text as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())


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
            early = [next(value for step, value in bits if step) for bits in found]
            quarter = spread(early) if directions.DIRECTIONS[name].evaluations > 1 else "-"
            end = spread([bits[-1][1] for bits in found])
            lines.append(f"| {start} | {by} | {before} | {quarter} | {end} | {len(found)} |")
    return "\n".join([*lines, f"| the teacher | | {teacher:.3f} | | | |"])


def draw(name: str, runs: list[dict], teacher: float, path: Path) -> None:
    """Left bits per byte by step, mean and range of the seeds; right each seed at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, ends) = pyplot.subplots(
        1, 2, figsize=(11, 4.4), width_ratios=(3, 2), layout="constrained"
    )
    finished = {(run["start"], run["by"]) for run in runs}
    coloured = zip(directions.DIRECTIONS[name].arms, COLOURS, strict=False)
    arms = {arm: colour for arm, colour in coloured if arm in finished}
    starts = list(dict.fromkeys(start for start, _ in arms))
    for row, ((start, by), colour) in enumerate(arms.items()):
        found = [run["bits"] for run in runs if (run["start"], run["by"]) == (start, by)]
        steps = [step for step, _ in found[0]]
        values = [[bits[at][1] for bits in found] for at in range(len(steps))]
        line = LINES[starts.index(start) % len(LINES)]
        means = [fmean(seeds) for seeds in values]
        curves.plot(steps, means, line, marker="o", markersize=4, color=colour)
        low, high = ([edge(seeds) for seeds in values] for edge in (min, max))
        curves.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        ends.plot(values[-1], [row] * len(found), "o", color=colour, alpha=0.7)
    for panel, draw_line in ((curves, curves.axhline), (ends, ends.axvline)):
        draw_line(teacher, color="black", linestyle=":", linewidth=1)
        panel.spines[["top", "right"]].set_visible(False)
    curves.annotate("the teacher", (0, teacher), (2, -3), textcoords="offset points", va="top")
    curves.set(xlabel="step", ylabel="bits per byte on held-out text", title="While training")
    curves.margins(y=0.08)
    ends.set(xlabel="bits per byte on held-out text", title="At the end, each seed")
    ends.set_yticks(range(len(arms)), [f"{start}: {by}" for start, by in arms])
    for label, colour in zip(ends.get_yticklabels(), arms.values(), strict=True):
        label.set_color(colour)
    ends.set_ylim(len(arms) - 0.5, -0.5)
    ends.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--direction", choices=list(directions.DIRECTIONS), default="moe_to_dense")
    parser.add_argument("--seeds", type=int, default=1, help="how many, of 3")
    parser.add_argument("--steps", type=int, help="of 4,096 tokens (100; of densify 25)")
    parser.add_argument("--processes", type=int, default=1, help="of a run, 1 or 2")
    parser.add_argument("--folder", type=Path, default=Path("runs/moe_to_dense"))
    parser.add_argument("--results", type=Path, help="default: results in --folder")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    options.steps = options.steps or directions.DIRECTIONS[options.direction].steps
    if not 1 <= options.seeds <= len(SEEDS):
        parser.error(f"--seeds: {options.seeds} is none of 1 to {len(SEEDS)}")
    return options


def main() -> None:
    options = parse()
    folder, name = options.folder.absolute(), options.direction
    results = options.results or folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    listed, study = results / f"{name}.jsonl", Study(name, folder, options.processes)
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
