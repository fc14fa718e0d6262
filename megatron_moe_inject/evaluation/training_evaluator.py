"""Measuring beside training: before the first step and whenever Megatron evaluates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_moe_inject.evaluation.evaluation import Evaluation
from megatron_moe_inject.evaluation.evaluation_file import LIST, append_line, read_list, write_list
from megatron_moe_inject.evaluation.evaluator import NO_DATA, Evaluator
from megatron_moe_inject.evaluation.gate import judge
from megatron_moe_inject.evaluation.measurement import Collected, Measurement
from megatron_moe_inject.evaluation.section import EVALUATION
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.agreement import on_first_rank
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.files import try_file
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext


class TrainingEvaluator(Evaluator):
    """Measures before the first step and whenever Megatron evaluates, into a list on disk.

    The list has one line for an iteration and belongs to one injection. A run that goes on, from
    whatever folder, goes on with it: lines beyond the iteration that it resumes from are dropped,
    since they will be measured again.
    """

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        spec = run.recipe[EVALUATION]
        assert spec is not None
        self._gate, named, save = spec.gate, spec.file, run.args.save
        self._named_by = "--save" if named is None else "evaluation.file"
        self.path = Path(named) if named is not None else Path(save or "") / LIST
        if named is not None and not self.path.absolute().parent.is_dir():
            folder = self.path.absolute().parent
            raise RecipeError(f"evaluation.file: {folder} is no folder; create it first")
        self._seen: set[int] = set()
        self._text: str | None = None
        self._training = False
        self._failed: RecipeError | None = None
        self._measured: Evaluation | None = None
        self._lineage = run.lineage
        self.around = {**self.around, "train": self._around_training}
        run.provide(TrainingEvaluator, self)

    def try_outputs(self) -> None:
        """The first rank writes the list."""
        if dist.get_rank() == 0:
            try_file(self.path, self._named_by)

    def attach(self, student: BuiltStudent) -> Measurement:
        """Make the measurement of this rank, and find the list of the injection that goes on.

        Collectives: those of ``on_first_rank``.

        Raises:
            RecipeError: on every rank: what may be the list is damaged.
        """
        measurement = super().attach(student)
        remark = self._adopt()
        self._run.warnings += [] if remark is None else [remark]
        return measurement

    def _around_training(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        self.before_training(stock, args, kwargs)
        return stock(*args, **kwargs)

    def _adopt(self) -> str | None:
        """Find the list; a remark for the plan where there is none."""
        lineage = self._lineage
        self._source = on_first_rank(lambda: lineage.find(self.path, LIST))
        if lineage.begins or self._source is not None:
            return None
        where = "was not measured from its beginning on"
        if lineage.was_kept(LIST):
            where = f"has a list that is in none of {lineage.sought(self.path, LIST)}"
        return (
            f"evaluation: the injection that goes on from {lineage.checkpoint} {where}; gains are "
            "counted from here"
        )

    def before_training(self, train: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Measure with what ``train`` will be called with, and ask the teacher gate.

        Collectives: those of ``on_first_rank`` and of an evaluation.

        Raises:
            RecipeError: on every rank: no validation data, the list cannot be continued, its
                lines are of other text, or a teacher is no better than the student.
        """
        if not self._on_any_rank(self.text.exists):
            raise RecipeError(NO_DATA.format("evaluation"))
        self._seen, first = on_first_rank(self._continued)
        self._lineage.keep(LIST, self.path)
        self._text = None if first is None else first.text()
        self._measured = None
        asks = self._lineage.begins and self._gate
        with self.measurement.comparing_prefix() if asks else contextlib.nullcontext():
            compat.evaluate_before_training(train, args, kwargs)
        self._training = True
        if self._measured is not None:
            lineage = self._lineage
            lines, verdict = judge(
                self._measured,
                self.recipe,
                begins=lineage.begins,
                verdict=lineage.verdict,
                # With an identity the checkpoint has a verdict, if the beginning was measured.
                first=None if lineage.identity else first,
            )
            lineage.judge(verdict)
            if lines and dist.get_rank() == 0:
                print("\n".join(lines), flush=True)
        elif self._lineage.begins and self._gate:
            raise RecipeError(
                "evaluation: the held-out text was not read to the end, so that no teacher was "
                "compared with the student; give --exit-duration-in-mins enough time"
            )
        self._measured = None

    def _continued(self) -> tuple[set[int], Evaluation | None]:
        """Iterations that the list keeps, and its first line."""
        now = compat.optimizer_steps(self.args)
        listed = [] if self._source is None else read_list(self._source)
        listed = [e for e in listed if e.provenance.iteration <= now]
        moved = self._lineage.make_room(self.path)
        if moved is not None:
            print(f"evaluation: {moved}", flush=True)
        write_list(self.path, listed)
        return {e.provenance.iteration for e in listed}, listed[0] if listed else None

    def measured(self, collected: Collected, iteration: int) -> None:
        """Make a line of what was measured. In training, what is wrong with it is said, and is the
        run's error when its last checkpoint is saved (``finish``)."""
        try:
            super().measured(collected, iteration)
        except RecipeError as error:
            if not self._training:
                raise
            self._failed = self._failed or error
            if dist.get_rank() == 0:
                print(f"megatron_moe_inject: warning: {error}", flush=True)

    def finish(self) -> str | None:
        """The first error of an evaluation in training; found on every rank alike.

        Raises:
            RecipeError: there was one.
        """
        if self._failed is not None:
            raise self._failed
        return None

    def record(self, evaluation: Evaluation) -> None:
        """Add a line where the iteration has none yet.

        Collectives: before training those of ``agree``; none later, when a full disk is worth a
        warning and not the run.
        """
        injection = self._lineage.identity
        assert injection is not None, "agreed before parts are attached"
        provenance = replace(evaluation.provenance, injection=injection)
        evaluation = self._measured = replace(evaluation, provenance=provenance)
        if self._text is not None and evaluation.text() != self._text:
            raise RecipeError(
                f"evaluation: {self.path} was measured on other text than this run reads; keep "
                "--eval-iters, --global-batch-size, --seq-length, --seed, --split and the data, or "
                "name another evaluation.file"
            )
        self._text = evaluation.text()
        iteration = evaluation.provenance.iteration
        if iteration in self._seen:
            return
        self._seen.add(iteration)
        if not self._training:
            on_first_rank(lambda: append_line(self.path, evaluation))
        elif dist.get_rank() == 0:
            try:
                append_line(self.path, evaluation)
            except RecipeError as error:
                print(f"megatron_moe_inject: warning: evaluation: {error}", flush=True)
