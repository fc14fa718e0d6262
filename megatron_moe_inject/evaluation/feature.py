"""Evaluation as a feature: alone, or beside training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_moe_inject.evaluation.section import EVALUATION
from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.host.files import is_file_path
from megatron_moe_inject.recipe import run_kinds
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.feature import Feature
from megatron_moe_inject.recipe.schema import Recipe

if TYPE_CHECKING:
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart


class EvaluationFeature(Feature):
    """``evaluation``: gain and forgetting on held-out text, and the teacher gate."""

    section = EVALUATION
    runs = (run_kinds.INJECTION, run_kinds.EVALUATION)

    def rules(self, recipe: Recipe) -> None:
        """A file is a file."""
        spec = recipe[EVALUATION]
        if spec is not None and spec.file is not None and not is_file_path(spec.file):
            remedy = "name one, or leave it out for <save>"
            raise fail("evaluation.file", spec.file, "is no file", remedy)

    def plan_lines(self, recipe: Recipe, facts: StudentFacts | None) -> dict[str, list[str]]:
        """When, where to, and whether it may stop the run."""
        spec = recipe[EVALUATION]
        if spec is None:
            return {}
        stops = "a teacher that is no better than the student stops the run"
        where = spec.file or "the --save folder"
        return {
            "evaluation": [
                f"before, between and after training, into {where}",
                stops if spec.gate else "no teacher gate",
            ]
        }

    def start(self, run: RunContext) -> RunPart | None:
        """Take over Megatron's evaluation."""
        from megatron_moe_inject.evaluation.measured_run import MeasuredRun
        from megatron_moe_inject.evaluation.training_evaluator import TrainingEvaluator

        if run.kind == run_kinds.EVALUATION:
            return MeasuredRun(run)
        if run.recipe[EVALUATION] is None or run.args.skip_train:
            return None
        return TrainingEvaluator(run)
