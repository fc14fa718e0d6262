"""Where a run begins, as a feature: what it goes on from, and what it may save over."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.feature import Feature
from megatron_moe_inject.recipe.run_kinds import EVALUATION, GENERATION, INJECTION, PROFILE
from megatron_moe_inject.recipe.schema import Recipe

if TYPE_CHECKING:
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart


class BeginningFeature(Feature):
    """From which checkpoint and iteration a run goes on, and with which recipe; see
    ``recipe.beginning_checks``."""

    runs = (INJECTION, EVALUATION, PROFILE, GENERATION)

    def foresee(self, recipe: Recipe, facts: StudentFacts, args: Namespace) -> list[str]:
        """As ``start``, and that the student is there."""
        from megatron_moe_inject.host.student_load import StudentLoad
        from megatron_moe_inject.recipe.beginning_checks import check_beginning

        named = (args.load, getattr(args, "pretrained_checkpoint", None), args.inject_from_scratch)
        if not any(named):
            return ["no --load: training needs the student's checkpoint, or --inject-from-scratch"]
        StudentLoad(args)
        return check_beginning(recipe, args)

    def start(self, run: RunContext) -> RunPart | None:
        """A run that only evaluates takes weights alone from its checkpoint, which may hold no
        more, as after ``moe-inject apply-delta``; one that trains is checked, and lets its own
        checkpoints know its recipe."""
        from megatron_moe_inject.recipe.beginning_checks import (
            VALUES,
            check_beginning,
            recipe_values,
        )

        if run.kind != INJECTION:
            run.args.no_load_optim = run.args.no_load_rng = True
            return None
        run.warnings += check_beginning(run.recipe, run.args)
        setattr(run.args, VALUES, recipe_values(run.recipe))
        return None
