"""One machine trains on its student's own text: some steps, roll out, some steps.

    python examples/on_policy/loop.py OUT [--rounds 3] [--steps 20] [--seeds 1 2 3] [--judge]
        [--vllm PYTHON] [--documents N]

Starts from the quickstart's models and code. The first steps read the fixed corpus. From their
checkpoint two runs go on with the same loss and batches: one on the fixed corpus alone, one with
half of its samples from what the student wrote since its last checkpoint. That one is a single
process, which waits at each checkpoint until its student has written. Both are measured on held-out
code and, with ``--judge``, on text that each student writes from held-out prompts. ``OUT/table.md``
has the result at equal steps and at equal processor time, of which starts of processes are told
apart: a training that takes days does not notice them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "quickstart")]

from processes import Process  # noqa: E402
from runner import flags, logged  # noqa: E402
from server import Server  # noqa: E402

QUICKSTART = HERE.parent / "quickstart"
LENGTH, BATCH = 128, 8
"""Tokens of a sample, and samples of a step."""
PROMPT = 32
NAMES = {"own": "half its own text", "fixed": "fixed corpus"}
LIMIT = 400
"""Steps that a run's schedule knows; runs end before."""
_STEPS_BEGIN = "[before the start of training step]"
MEGATRON = (
    *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"),
    *("-m", "megatron_moe_inject.pretrain", "--cpu"),
)
PATIENCE = 36_000
"""Seconds that a training waits for what its student writes."""
_BEGAN = time.monotonic()


class Arm:
    """A training run, from a checkpoint on.

    Args:
        process: that trains.
        earlier: processor seconds of the steps before.

    Attributes:
        starts: processor seconds of starting processes, which ``at`` leaves out.
        writing: of writing.
        at: of training and writing, until the checkpoint of a step was there.
    """

    def __init__(self, process: Process, earlier: float) -> None:
        self._process, self._earlier = process, earlier
        self._start = self.starts = process.until(_STEPS_BEGIN)
        self.writing = 0.0
        self.at: dict[int, float] = {}

    def reach(self, step: int) -> None:
        """Until the checkpoint of a step is there, or the run has ended."""
        spent = self._process.until(f"saved checkpoint from iteration {step:7d} to")
        self.at[step] = self._earlier + spent - self._start + self.writing

    def wrote(self, starts: float, writing: float) -> None:
        """Add what its student's writing took."""
        self.starts += starts
        self.writing += writing

    def end(self) -> None:
        """Until it ends by itself."""
        self._process.end()


class Loop:
    """The runs of one seed.

    Args:
        out: folder of all that is written.
        options: of the command.
        seed: of what Megatron draws, the order of samples among it.
    """

    def __init__(self, out: Path, options: argparse.Namespace, seed: int) -> None:
        self.out, self.seed = out / f"seed-{seed}", seed
        self.steps, self.rounds = options.steps, options.rounds
        self.common = out / "common"
        self.data = self.common / "data"
        self.code = str(self.data / ("code_slice" if options.documents is None else "code_few"))
        self.documents = options.documents
        self.server = None
        if options.vllm is not None:
            self.server = Server(options.vllm, self.out, LENGTH + 1)

    @property
    def last(self) -> int:
        """The step that both runs reach."""
        return self.steps * (1 + self.rounds)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - _BEGAN:4.0f} s] seed {self.seed}: {text}", flush=True)

    def prepare(self) -> None:
        """Cut the corpora and unpack both models, once for all seeds."""
        if (self.common / "student").exists():
            return
        self.say("text, student and teacher")
        logged(self.common / "corpora.log", str(QUICKSTART / "corpora.py"), str(self.data))
        if self.documents is not None:
            few = (str(self.data / "code_slice"), self.code, str(self.documents))
            logged(self.common / "few.log", str(HERE / "few_documents.py"), *few)
        for name, architecture in (("teacher", "TEACHER"), ("student", "STUDENT")):
            logged(
                self.common / f"unpack-{name}.log",
                *(str(QUICKSTART / "models.py"), "unpack", name, str(self.common / name), "--"),
                *flags(architecture, "BOTH"),
            )

    def flags(self, arm: str, recipe: Path, load: Path) -> list[str]:
        """Of a run of an arm, that trains at a constant learning rate."""
        blend = ("0.5", self.code, "0.5", self.code)
        held_out = str(self.data / "code_held_out")
        return [
            *flags("STUDENT", "BOTH", "TRAINING"),
            *("--seq-length", str(LENGTH), "--micro-batch-size", str(BATCH)),
            *("--global-batch-size", str(BATCH), "--train-iters", str(LIMIT)),
            *("--lr", "1e-3", "--lr-decay-style", "constant", "--lr-warmup-fraction", "0.01"),
            *("--train-data-path", *blend, "--valid-data-path", held_out),
            *("--data-cache-path", str(self.out / f"cache-{arm}"), "--load", str(load)),
            *("--eval-interval", str(self.steps), "--eval-iters", "16", "--log-interval", "1"),
            *("--seed", str(self.seed), "--inject-recipe", str(recipe)),
        ]

    def recipe(self, arm: str) -> Path:
        """The example's recipe, for an arm: with or without text of the student's own."""
        text = (HERE / "recipe.yaml").read_text()
        for name, path in (
            ("TEACHER", self.common / "teacher"),
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

    def train(self, arm: str, begin: int, last: int, load: Path, *more: str) -> Process:
        """Begin to train until a step, with a checkpoint at the end of each round."""
        self.say(f"{NAMES[arm]}: step {begin} to {last}")
        return Process(
            self.out / f"train-{arm}.log",
            *MEGATRON,
            *self.flags(arm, self.recipe(arm), load),
            *("--save", str(self.out / arm), "--save-interval", str(self.steps)),
            *("--exit-interval", str(last), *more),
        )

    def fixed(self) -> Arm:
        """The fixed corpus alone, from the first step on, for longer than both."""
        begin = ("--finetune", "--no-load-optim", "--no-load-rng")
        last = self.last + self.rounds * self.steps
        process = self.train("fixed", 0, last, self.common / "student", *begin)
        arm = Arm(process, 0.0)
        for step in range(self.steps, last + 1, self.steps):
            arm.reach(step)
        arm.end()
        return arm

    def own(self, earlier: float) -> Arm:
        """From the first checkpoint of the fixed corpus on, half of each batch its own."""
        folder = self.out / "own"
        folder.mkdir()
        name = f"iter_{self.steps:07d}"
        shutil.copytree(self.out / "fixed" / name, folder / name)
        (folder / "latest_checkpointed_iteration.txt").write_text(str(self.steps))
        texts = self.out / "own-own"
        count = self.steps * BATCH // 2
        begun = self.write("own", folder, self.steps, texts, self.code, count, seed=self.seed)
        waits = ("--inject-set", "rollouts.late=wait", f"rollouts.patience={PATIENCE}")
        process = self.train("own", self.steps, self.last, folder, *waits)
        arm = Arm(process, earlier)
        arm.wrote(*begun)
        for step in range(2 * self.steps, self.last + 1, self.steps):
            arm.reach(step)
            if step < self.last:
                seed = self.seed + 1000 * step
                arm.wrote(*self.write("own", folder, step, texts, self.code, count, seed=seed))
        arm.end()
        return arm

    def write(
        self, arm: str, load: Path, step: int, output: Path, prompts: str, count: int, seed: int
    ) -> tuple[float, float]:
        """Let a checkpoint write; processor seconds of starting what writes, and of writing."""
        self.say(f"{NAMES[arm]}: the student of step {step} writes {count} texts")
        command = [
            *("--prompts", prompts, "--output", str(output), "--prompt-tokens", str(PROMPT)),
            *("--max-tokens", str(LENGTH + 1 - PROMPT), "--count", str(count)),
            *("--batch", str(count), "--per-file", str(count), "--seed", str(seed)),
        ]
        of_step = ("--ckpt-step", str(step))
        served, before = 0.0, 0.0
        if self.server is not None:
            before = self.server.seconds()
            exporting = self.server.serve(load, step)
            served = self.server.seconds()
            command += ["--server", self.server.url, "--checkpoint", str(load), *of_step]
        else:
            recipe = self.recipe(arm)
            flags_of_run = self.flags(arm, recipe, load)[:-2]
            command = [str(recipe), "--cpu", *command, "--", *flags_of_run, *of_step]
            exporting = 0.0
        writer = Process(
            self.out / f"write-{arm}.log", "-m", "megatron_moe_inject.cli", "rollouts", *command
        )
        starts = writer.until("files to write")
        writing = writer.end() - starts
        if self.server is not None:
            starts += exporting + served - before
            writing += self.server.seconds() - served
        self.say(f"    {starts:.1f} processor seconds to start, {writing:.1f} to write")
        return starts, writing

    def own_text(self, arm: str, step: int) -> tuple[float, float]:
        """KL(student || teacher) on text that the student of a checkpoint writes from held-out
        prompts, and its own cross-entropy there, in nats per token."""
        texts = self.out / f"judged-{arm}"
        shutil.rmtree(texts, ignore_errors=True)
        folder = self.out / arm
        self.write(arm, folder, step, texts, str(self.data / "code_held_out"), 80, seed=99)
        text = self.recipe("own").read_text().replace(str(self.out / "own-own"), str(texts))
        recipe = self.out / f"recipe-judge-{arm}.yaml"
        recipe.write_text(text.replace("evaluation:", "# evaluation:"))
        settings = ("objective.divergence=reverse_kl", "rollouts.every=1", "rollouts.late=wait")
        self.say(f"{NAMES[arm]}: the teacher reads them")
        judge = Process(
            self.out / f"judge-{arm}.log",
            *MEGATRON,
            *self.flags(arm, recipe, folder),
            *("--inject-set", *settings, "--no-load-optim", "--no-load-rng", "--lr", "0"),
            *("--min-lr", "0", "--ckpt-step", str(step), "--exit-interval", str(step + 10)),
        )
        judge.end()
        found = judge.log.read_text(errors="replace")
        kl = [float(x) for x in re.findall(r"kd loss/own: ([0-9.E+-]+)", found)]
        ce = [float(x) for x in re.findall(r"\| lm loss/own: ([0-9.E+-]+)", found)]
        return statistics.mean(kl), statistics.mean(ce)

    def rows(self, judge: bool) -> list[dict[str, float | str]]:
        """Everything of this seed: a row for each run and step of the table."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        fixed = self.fixed()
        try:
            own = self.own(fixed.at[self.steps])
            # A step costs the same in both, but for what else the machine does meanwhile.
            most = max(fixed.at)
            trained = fixed.at[most] + own.at[self.last] - own.writing - fixed.at[self.steps]
            price = trained / (most + self.last - self.steps)
            worth = self.last + own.writing / price
            rows = []
            for arm, run, step, what in (
                ("own", own, float(self.last), "steps"),
                ("fixed", fixed, float(self.last), "steps"),
                ("fixed", fixed, min(worth, most), "time"),
            ):
                evaluations = measured(self.out / f"evaluation-{arm}.jsonl")
                row: dict[str, float | str] = {
                    "arm": arm, "alike": what, "seed": self.seed, "step": step,
                    "seconds": step * price + run.writing, "writing": run.writing,
                    "starts": run.starts,
                    "loss": between(evaluations, step, "loss"),
                    "kl": between(evaluations, step, "teacher_kl"),
                }  # fmt: skip
                if judge:
                    saved = round(step / self.steps) * self.steps
                    row["own_kl"], row["own_ce"] = self.own_text(arm, saved)
                rows.append(row)
        finally:
            if self.server is not None:
                self.server.stop()
        return rows


def between(evaluations: dict[int, dict[str, float]], step: float, name: str) -> float:
    """A mean at a step, on the line between the evaluations around it."""
    before = max(at for at in evaluations if at <= step)
    after = min(at for at in evaluations if at >= step)
    part = (step - before) / max(after - before, 1)
    return evaluations[before][name] * (1 - part) + evaluations[after][name] * part


def measured(path: Path) -> dict[int, dict[str, float]]:
    """Means of the class code by iteration, of a list of evaluations."""
    from megatron_moe_inject.evaluation.evaluation_file import read_list

    found = {}
    for evaluation in read_list(path):
        found[evaluation.provenance.iteration] = evaluation.classes["code"].summary()
    return found


def table(rows: Sequence[dict[str, float | str]]) -> str:
    """Mean over seeds, and the largest distance from it, of each run and step."""
    names = {
        "step": ("steps", 0), "seconds": ("processor seconds", 0), "writing": ("of writing", 0),
        "starts": ("starts beside", 0),
        "loss": ("loss on held-out code", 3),
        "kl": ("KL to the teacher there", 3), "own_kl": ("KL to the teacher on own text", 3),
        "own_ce": ("own text's entropy", 3),
    }  # fmt: skip
    keys = [key for key in names if key in rows[0]]
    lines = ["| text | alike in | " + " | ".join(names[key][0] for key in keys) + " |"]
    lines.append("|---" * (len(keys) + 2) + "|")
    for kind in dict.fromkeys((row["arm"], row["alike"]) for row in rows):
        own = [row for row in rows if (row["arm"], row["alike"]) == kind]
        cells = []
        for key in keys:
            values = [float(row[key]) for row in own]
            mean = statistics.mean(values)
            spread = max(abs(value - mean) for value in values)
            digits = names[key][1]
            cells.append(f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread else ""))
        lines.append(f"| {NAMES[str(kind[0])]} | {kind[1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run everything; a table on the screen and in ``OUT/table.md`` after each seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="of a round (default 20)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234])
    parser.add_argument("--judge", action="store_true", help="on text of the student's own, too")
    parser.add_argument("--vllm", metavar="PYTHON", help="let vLLM of this Python write")
    parser.add_argument("--documents", type=int, metavar="N", help="of the fixed corpus alone")
    options = parser.parse_args(argv)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, float | str]] = []
    for seed in options.seeds:
        loop = Loop(out, options, seed)
        loop.prepare()
        rows += loop.rows(options.judge)
        (out / "rows.json").write_text(json.dumps(rows, indent=1))
        (out / "table.md").write_text(table(rows) + "\n")
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()
