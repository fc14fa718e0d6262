"""A run that only measures: student and teachers on the validation data, into one file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_moe_inject.evaluation.evaluation import Evaluation
from megatron_moe_inject.evaluation.evaluation_file import write_evaluation
from megatron_moe_inject.evaluation.evaluator import Evaluator
from megatron_moe_inject.host.agreement import on_first_rank
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.files import try_file
from megatron_moe_inject.host.text import table
from megatron_moe_inject.preference.measured_pairs import MeasuredPairs
from megatron_moe_inject.recipe.run_part import RunContext

_FLAG = "--inject-evaluate"


class MeasuredRun(Evaluator):
    """Measures once, without training: nothing is frozen, and the only loss is the measured
    cross-entropy."""

    def __init__(self, run: RunContext) -> None:
        self._path = Path(run.args.inject_evaluate)
        super().__init__(run, reason=_FLAG)
        self._summary = ""

    def try_outputs(self) -> None:
        """The first rank writes the file."""
        if dist.get_rank() == 0:
            try_file(self._path, _FLAG)

    def iteration(self, told: int) -> int:
        """The checkpoint's iteration, also where ``--finetune`` makes Megatron count from 0."""
        return told if self._run.origin.iteration is None else self._run.origin.iteration

    def other_data(self, evaluate: Callable[[], Any]) -> None:
        """The test data are not read."""

    def record(self, evaluation: Evaluation) -> None:
        """Write the file.

        Collectives: those of ``on_first_rank``.
        """
        on_first_rank(lambda: write_evaluation(self._path, evaluation))
        self._summary = f"evaluation: written to {self._path}\n" + describe(evaluation)

    def finish(self) -> str | None:
        """What was found.

        Raises:
            RecipeError: nothing was, or not all of the text was read in time.
        """
        if not self._summary:
            raise RecipeError(
                f"{_FLAG}: the validation data were not read to the end, {self._path} is not "
                "written; give --split or --valid-data-path some, and --exit-duration-in-mins "
                "enough time"
            )
        return self._summary


def describe(evaluation: Evaluation) -> str:
    """An evaluation as a table, a line for each class."""
    formats = {
        "tokens": "{:,d}", "loss": "{:.4f}", "bits_per_byte": "{:.4f}", "accuracy": "{:.4f}",
        "calibration_error": "{:.4f}", "teacher_loss": "{:.4f}", "teacher_kl": "{:.4f}",
        "teacher_agreement": "{:.4f}",
    }  # fmt: skip
    rows = [("class", *(name.replace("_", " ") for name in formats))]
    for name, results in evaluation.classes.items():
        summary = results.summary()
        cells = ["-" if summary[k] is None else f.format(summary[k]) for k, f in formats.items()]
        rows.append((name, *cells))
    lines = table(rows, right=range(1, len(rows[0])))
    if not any("bytes" in results.sums for results in evaluation.classes.values()):
        lines.append("(no bits per byte: this tokenizer has no text)")
    if evaluation.pairs is not None:
        lines += ["", *_pairs(evaluation.pairs)]
    return "\n".join(lines)


def _pairs(pairs: MeasuredPairs) -> list[str]:
    against = pairs.against or "no reference, so no loss and no rewards"
    rows = [
        (name.removeprefix("preference "), f"{mean:.4f}") for name, mean in pairs.means().items()
    ]
    return [f"{len(pairs.hashes):,} pairs of answers, against {against}", *table(rows, right=(1,))]
