"""Progress on a terminal, as a feature of runs that only evaluate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_moe_inject.recipe.feature import Feature
from megatron_moe_inject.recipe.run_kinds import PROFILE

if TYPE_CHECKING:
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart


class ProgressFeature(Feature):
    """A bar over the steps."""

    runs = (PROFILE,)

    def start(self, run: RunContext) -> RunPart | None:
        """Nothing is drawn before the first step."""
        from megatron_moe_inject.recipe.progress_part import ProgressPart

        return ProgressPart(run)
