"""Ends training in a step that cannot be made, with what was trained until then in a checkpoint.

Megatron has a way out of a step before the optimizer's: when its rerun machinery has found a fault,
``train_step`` returns that a checkpoint is to be saved and training to end. A part of the step that
cannot do its work raises ``CannotGoOn`` on every rank before the schedule runs, so that nothing of
the step has changed anything; here it becomes that return. An evaluation that ends so is given up,
and the next training step leaves, or, where none comes, training ends as it would have. The run
then ends with the reason, once all is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_moe_inject.host import compat
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.failure import EXIT_CODE


class CannotGoOn(RecipeError):
    """On every rank, before a step's schedule: why the step cannot be made."""


class LeaveTraining:
    """Stands around Megatron's steps and evaluations.

    Args:
        saves: whether there is something to save that is not saved yet.

    Attributes:
        reason: why training ends; None while it does not.
        around: see ``recipe.run_part.RunPart``.
    """

    def __init__(self, saves: Callable[[], bool]) -> None:
        self.reason: CannotGoOn | None = None
        self._saves = saves
        self.around = {"train_step": self._step, "evaluate_and_print_results": self._evaluate}

    def _step(self, stock: Callable, *args: Any, **kwargs: Any) -> tuple:
        if self.reason is None:
            try:
                return stock(*args, **kwargs)
            except CannotGoOn as reason:
                self.reason = reason
                compat.take_step_back()
        # As train_step itself returns: no losses, skipped, save, leave, exit code, no norms.
        return {}, True, self._saves(), True, EXIT_CODE, None, None, 0

    def _evaluate(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        if self.reason is not None:
            return None
        try:
            return stock(*args, **kwargs)
        except CannotGoOn as reason:
            self.reason = reason
            return None
