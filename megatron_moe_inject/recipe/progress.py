"""Progress as a feature: steps, the time left, the losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_moe_inject.recipe.feature import Feature
from megatron_moe_inject.recipe.run_kinds import EVALUATION, INJECTION, PROFILE

if TYPE_CHECKING:
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart


class ProgressFeature(Feature):
    """``--inject-progress``, which our own entry sets, and all runs that only evaluate."""

    runs = (INJECTION, EVALUATION, PROFILE)

    def start(self, run: RunContext) -> RunPart | None:
        """Nothing is shown before the first step."""
        from megatron_moe_inject.recipe.progress_part import EvaluationProgress, TrainingProgress

        if run.kind != INJECTION:
            return EvaluationProgress(run)
        return TrainingProgress(run) if run.args.inject_progress else None
