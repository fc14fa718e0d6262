"""The run's list for the report as a feature."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_moe_inject.evaluation.section import EVALUATION
from megatron_moe_inject.recipe.feature import Feature

if TYPE_CHECKING:
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart


class ReportFeature(Feature):
    """The run's list beside its checkpoints, wherever training is evaluated."""

    def start(self, run: RunContext) -> RunPart | None:
        """Listen to Megatron's log."""
        if run.recipe[EVALUATION] is None or run.args.skip_train or not run.args.save:
            return None
        from megatron_moe_inject.evaluation.report.run_log import RunLog

        return RunLog(run)
