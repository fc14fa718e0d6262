"""Progress in a run that only evaluates."""

from __future__ import annotations

import torch.distributed as dist

from megatron_moe_inject.host.progress import StepProgress
from megatron_moe_inject.recipe.run_part import RunContext, RunPart, Student


class ProgressPart(RunPart):
    """Draws on the first rank's terminal."""

    def __init__(self, run: RunContext) -> None:
        self._args = run.args

    def attach(self, student: Student) -> StepProgress:
        """No collective."""
        self._progress = StepProgress(dist.get_rank(), self._steps)
        return self._progress

    def finish(self) -> None:
        """Leave the last state on the screen."""
        self._progress.close()

    def _steps(self) -> int | None:
        """How many steps Megatron evaluates, None where it reads all of the data."""
        splits = [getattr(self._args, name, True) for name in ("do_valid", "do_test")]
        iterations = self._args.eval_iters
        return sum(map(bool, splits)) * iterations if iterations and iterations > 0 else None
