"""Evaluation as a feature: alone, or beside training."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from megatron_moe_inject.evaluation.section import EVALUATION
from megatron_moe_inject.host.errors import RecipeError, fail
from megatron_moe_inject.host.files import is_file_path
from megatron_moe_inject.recipe import run_kinds
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.feature import Feature
from megatron_moe_inject.recipe.schema import Recipe

if TYPE_CHECKING:
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart


_NO_PLACE = (
    "evaluation.file: missing, and there is no --save folder to write to; add --save, or name a "
    "file with evaluation.file"
)


def _lacks_place(recipe: Recipe, args: Namespace) -> bool:
    spec = recipe[EVALUATION]
    return spec is not None and spec.file is None and not args.save and not args.skip_train


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

    def foresee(self, recipe: Recipe, facts: StudentFacts, args: Namespace) -> list[str]:
        """A plan writes nothing, so a place to write to is not missing yet."""
        return [f"training needs it: {_NO_PLACE}"] if _lacks_place(recipe, args) else []

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
        if _lacks_place(run.recipe, run.args):
            if not run.dry_run:
                raise RecipeError(_NO_PLACE, "evaluation.file")
            run.warnings.append(f"training needs it: {_NO_PLACE}")
        return TrainingEvaluator(run)
