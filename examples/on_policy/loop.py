"""One machine trains on its student's own text: some steps, roll out, some steps.

    python examples/on_policy/loop.py OUT [--rounds 3] [--steps 20]

Starts from the quickstart's models and code. The first steps read the fixed corpus. From their
checkpoint two runs go on with the same loss and batches: one on the fixed corpus alone, one with
half of its samples from what the student wrote since its last checkpoint. Both are measured on
held-out code, and on text that each student writes from held-out prompts. ``OUT/table.md`` has the
result at equal steps and at equal processor time.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "quickstart"))

from runner import flags, logged, megatron  # noqa: E402

QUICKSTART = HERE.parent / "quickstart"
LENGTH, BATCH = 128, 8
"""Tokens of a sample, and samples of a step."""
PROMPT = 32
NAMES = {"own": "half its own text", "fixed": "fixed corpus"}
LIMIT = 400
"""Steps that a run's schedule knows; runs end before."""


def used() -> float:
    """Processor seconds of all processes that have ended so far."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


class Loop:
    """The runs of the example.

    Args:
        out: folder of all that is written.
        steps: between two checkpoints.
    """

    def __init__(self, out: Path, steps: int) -> None:
        self.out, self.steps = out, steps
        self.data = out / "data"
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:.0f} s] {text}", flush=True)

    def prepare(self) -> None:
        """Cut the corpora and unpack both models."""
        self._say("text, student and teacher")
        logged(self.out / "corpora.log", str(QUICKSTART / "corpora.py"), str(self.data))
        for name, architecture in (("student", "STUDENT"), ("teacher", "TEACHER")):
            logged(
                self.out / f"unpack-{name}.log",
                *(str(QUICKSTART / "models.py"), "unpack", name, str(self.out / name), "--"),
                *flags(architecture, "BOTH"),
            )

    def flags(self, arm: str, recipe: Path, load: Path, *more: str) -> list[str]:
        """Of a run of an arm, that trains at a constant learning rate."""
        code = str(self.data / "code_slice")
        blend = ("0.5", code, "0.5", code)
        held_out = str(self.data / "code_held_out")
        return [
            *flags("STUDENT", "BOTH", "TRAINING"),
            *("--seq-length", str(LENGTH), "--micro-batch-size", str(BATCH)),
            *("--global-batch-size", str(BATCH), "--train-iters", str(LIMIT)),
            *("--lr", "1e-3", "--lr-decay-style", "constant", "--lr-warmup-fraction", "0.01"),
            *("--train-data-path", *blend, "--valid-data-path", held_out),
            *("--data-cache-path", str(self.out / f"cache-{arm}"), "--load", str(load)),
            *("--eval-interval", str(self.steps), "--eval-iters", "16", "--log-interval", "1"),
            *("--inject-recipe", str(recipe)),
            *more,
        ]

    def recipe(self, arm: str) -> Path:
        """The example's recipe, for an arm: with or without text of the student's own."""
        text = (HERE / "recipe.yaml").read_text()
        for name, path in (
            ("TEACHER", self.out / "teacher"),
            ("HELD_OUT", self.data / "code_held_out"),
            ("OWN", self.out / f"own-{arm}"),
            ("EVALUATION", self.out / f"evaluation-{arm}.jsonl"),
        ):
            text = text.replace(name, str(path))
        if arm == "fixed":
            text = re.sub(r', "rollouts:[^"]*"', "", text)
            text = re.sub(r"(?m)^rollouts:.*\n", "", text)
        path = self.out / f"recipe-{arm}.yaml"
        path.write_text(text)
        return path

    def train(self, arm: str, load: Path, *more: str) -> None:
        """Until the next checkpoint."""
        save = self.out / arm
        self._say(f"{NAMES[arm]}: {self.steps} steps")
        begin = used()
        megatron(
            self.out / f"train-{arm}.log",
            *self.flags(arm, self.recipe(arm), load, *more),
            *("--save", str(save), "--save-interval", str(self.steps)),
            *("--exit-interval", str(self.steps)),
        )
        self.seconds[arm] = self.seconds.get(arm, 0.0) + used() - begin

    def write(
        self, arm: str, load: Path, output: Path, prompts: str, count: int, seed: int
    ) -> None:
        """Let the newest checkpoint of an arm write; the processor time counts for the arm."""
        self._say(f"{NAMES[arm]}: the student writes {count} texts")
        begin = used()
        options = ("--prompt-tokens", str(PROMPT), "--max-tokens", str(LENGTH + 1 - PROMPT))
        logged(
            self.out / f"write-{arm}.log",
            *("-m", "megatron_moe_inject.cli", "rollouts", str(self.recipe(arm)), "--cpu"),
            *("--prompts", str(self.data / prompts), "--output", str(output), *options),
            *("--count", str(count), "--batch", "40", "--per-file", "40", "--seed", str(seed)),
            *("--", *self.flags(arm, self.recipe(arm), load)[:-2]),
        )
        self.seconds[arm] = self.seconds.get(arm, 0.0) + used() - begin

    def own_text(self, arm: str, iteration: int) -> tuple[float, float]:
        """KL(student || teacher) on text that the student of a checkpoint writes from held-out
        prompts, and its own cross-entropy there, in nats per token."""
        folder, before = self.out / f"judged-{arm}", self.seconds[arm]
        shutil.rmtree(folder, ignore_errors=True)
        self.write(arm, self.out / arm, folder, "code_held_out", 80, seed=99)
        self.seconds[arm] = before  # measuring is no part of training
        text = self.recipe("own").read_text()
        text = text.replace(str(self.out / "own-own"), str(folder))
        recipe = self.out / f"recipe-judge-{arm}.yaml"
        recipe.write_text(text.replace("evaluation:", "# evaluation:"))
        log = self.out / f"judge-{arm}.log"
        self._say(f"{NAMES[arm]}: the teacher reads them")
        settings = ("objective.divergence=reverse_kl", "rollouts.every=1", "rollouts.late=wait")
        megatron(
            log,
            *self.flags(arm, recipe, self.out / arm),
            *("--inject-set", *settings, "--no-load-optim", "--no-load-rng", "--lr", "0"),
            *("--min-lr", "0", "--exit-interval", str(iteration + 10)),
        )
        found = log.read_text(errors="replace")
        kl = [float(x) for x in re.findall(r"kd loss/own: ([0-9.E+-]+)", found)]
        ce = [float(x) for x in re.findall(r"lm loss/own: ([0-9.E+-]+)", found)]
        return sum(kl) / len(kl), sum(ce) / len(ce)


def measured(path: Path) -> dict[int, dict[str, float]]:
    """Means of the class code by iteration, of a list of evaluations."""
    from megatron_moe_inject.evaluation.evaluation_file import read_list

    found = {}
    for evaluation in read_list(path):
        found[evaluation.provenance.iteration] = evaluation.classes["code"].summary()
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run everything; a table on the screen and in ``OUT/table.md``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(argv)
    loop = Loop(options.out.resolve(), options.steps)
    loop.out.mkdir(parents=True, exist_ok=True)
    loop.prepare()
    begin = ("--finetune", "--no-load-optim", "--no-load-rng")
    loop.train("fixed", loop.out / "student", *begin)
    shutil.copytree(loop.out / "fixed", loop.out / "own", dirs_exist_ok=True)
    loop.seconds["own"] = loop.seconds["fixed"]
    for number in range(options.rounds):
        loop.write(
            "own", loop.out / "own", loop.out / "own-own", "code_slice",
            loop.steps * BATCH // 2, seed=number,
        )  # fmt: skip
        loop.train("own", loop.out / "own")
    last = loop.steps * (1 + options.rounds)
    own = loop.own_text("own", last)
    judged = []
    done = loop.steps
    while True:
        loop.train("fixed", loop.out / "fixed")
        done += loop.steps
        enough = loop.seconds["fixed"] >= loop.seconds["own"] or done >= LIMIT - 20
        if done == last or (done > last and enough):
            judged.append((done, loop.seconds["fixed"], loop.own_text("fixed", done)))
        if done >= last and enough:
            break
    evaluations = {arm: measured(loop.out / f"evaluation-{arm}.jsonl") for arm in ("own", "fixed")}
    lines = [
        "| text | steps | processor seconds | loss on held-out code | KL to the teacher there | "
        "KL to the teacher on own text | own text's entropy |",
        "|---|---|---|---|---|---|---|",
    ]

    def line(name: str, arm: str, at: int, seconds: float, text: tuple[float, float]) -> str:
        means = evaluations[arm][at]
        return (
            f"| {name} | {at} | {seconds:.0f} | {means['loss']:.4f} | {means['teacher_kl']:.4f} | "
            f"{text[0]:.4f} | {text[1]:.4f} |"
        )

    lines.append(line(NAMES["own"], "own", last, loop.seconds["own"], own))
    lines += [line(NAMES["fixed"], "fixed", *rest) for rest in judged]
    (loop.out / "table.md").write_text("\n".join(lines) + "\n")
    (loop.out / "seconds.json").write_text(json.dumps(loop.seconds))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
