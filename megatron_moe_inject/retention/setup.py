"""From a recipe to the retentions of a step, and to what must be kept twice for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_moe_inject.host.step import Step, StepPart
from megatron_moe_inject.recipe.schedule import ever_positive, value_at
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.retention.experts import ExpertRetention
from megatron_moe_inject.retention.originals import OriginalParameters
from megatron_moe_inject.retention.start import PullToStart


def kept_components(recipe: Recipe) -> list[str] | None:
    """Components (``freeze.COMPONENTS``) whose originals some retention needs, where they train.

    One copy serves all retentions. ``None`` = all components, ``[]`` = no retention.
    """
    used = recipe.objective.retention.in_use()
    if ever_positive(recipe.objective.gamma) or "l2" in used:
        return None
    kept = ["experts"] if "experts" in used else []
    return [*kept, "router"] if recipe.steering.retains else kept


class RetentionStep(StepPart):
    """What a step does about retention beside gamma and the routers'.

    Args:
        experts: holds experts' outputs; ``None`` without.
        start: pulls parameters to their start; ``None`` without.
    """

    def __init__(self, experts: ExpertRetention | None, start: PullToStart | None) -> None:
        self._experts = experts
        self._start = start

    def begin(self, step: Step) -> None:
        """Collectives: those of ``ExpertRetention.begin``."""
        if self._experts is not None:
            self._experts.begin(step.labels, step.iteration, step.sequence_length)

    def end(self, step: Step, reports: Any) -> None:
        """Collectives: those of ``ExpertRetention.end``, and of ``PullToStart.end`` in training."""
        if self._experts is not None:
            self._experts.end(reports)
        if self._start is not None and step.training:
            self._start.end(step.iteration, reports)


def retention_step(
    recipe: Recipe,
    chunks: Sequence[torch.nn.Module],
    groups: Any,
    originals: OriginalParameters | None,
    optimizer: Any,
) -> RetentionStep | None:
    """The retentions of this rank, once the student is loaded; ``None`` where none is asked for.

    Args:
        recipe: checked.
        chunks: this rank's bare model chunks.
        groups: the student's ``ProcessGroupCollection``.
        originals: of what ``kept_components`` names.
        optimizer: Megatron's; ``None`` in a run that trains nothing.

    Collectives: those of ``ExpertRetention``.

    Raises:
        RecipeError: experts are to be held, but none train.
    """
    retention = recipe.objective.retention
    used = retention.in_use()
    experts = start = None
    if "experts" in used:
        experts = ExpertRetention(
            chunks, groups, originals, lambda iteration: value_at(retention.experts, iteration)
        )
    if "l2" in used and optimizer is not None:
        start = PullToStart(
            chunks,
            groups,
            originals,
            optimizer,
            lambda iteration: value_at(retention.l2, iteration),
        )
    return RetentionStep(experts, start) if experts or start else None
