"""The loss as a feature: alpha * KD + beta * task + gamma * retention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_moe_inject.recipe.feature import Feature
from megatron_moe_inject.recipe.run_kinds import EVALUATION, INJECTION

if TYPE_CHECKING:
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart


class ObjectiveFeature(Feature):
    """``objective``; in a run that only measures, the measured cross-entropy."""

    runs = (INJECTION, EVALUATION)

    def start(self, run: RunContext) -> RunPart | None:
        """Computes it."""
        from megatron_moe_inject.loss_hook import ObjectivePart

        return ObjectivePart(run)
