"""Progress in a run: of its steps, or of its evaluation."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_moe_inject.host import compat
from megatron_moe_inject.host.progress import StepProgress
from megatron_moe_inject.recipe.run_kinds import EVALUATION
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext, RunPart


class EvaluationProgress(RunPart):
    """Shown by the first rank: a bar, or a line every ``--log-interval`` batches."""

    def __init__(self, run: RunContext) -> None:
        self._kind = run.kind
        self._args = run.args
        self._progress: StepProgress | None = None

    def attach(self, student: BuiltStudent) -> StepProgress | None:
        """No collective."""
        if dist.get_rank() == 0:
            interval = self._args.log_interval
            self._progress = StepProgress(self._kind, self._steps, interval=interval)
        return self._progress

    def finish(self) -> None:
        """Leave the last state on the screen."""
        if self._progress is not None:
            self._progress.finish()

    def _steps(self) -> int | None:
        """How many steps Megatron evaluates, None where it reads all of the data."""
        names = ("do_valid",) if self._kind == EVALUATION else ("do_valid", "do_test")
        splits = [getattr(self._args, name, True) for name in names]
        iterations = self._args.eval_iters
        if isinstance(iterations, list):  # of several validation sets
            return None if len(splits) > 1 and splits[1] else sum(iterations)
        return sum(map(bool, splits)) * iterations if iterations and iterations > 0 else None


class TrainingProgress(RunPart):
    """Shown by the last rank, which has the losses: a bar, or a line after each of Megatron's."""

    def __init__(self, run: RunContext) -> None:
        self._args = run.args
        self._terms = run.terms.interval()
        self._progress: StepProgress | None = None
        run.terms.listeners.append(self._listen)

    def attach(self, student: BuiltStudent) -> StepProgress | None:
        """No collective."""
        if dist.get_rank() == dist.get_world_size() - 1:
            begun = compat.optimizer_steps(self._args)
            self._progress = StepProgress(
                "training", lambda: self._args.train_iters - begun, training=True, interval=0
            )
        return self._progress

    def finish(self) -> None:
        """Leave the last state on the screen."""
        if self._progress is not None:
            self._progress.finish()

    def _listen(self, given: dict[str, Any], read: dict[str, Any] | None) -> None:
        """Megatron has written a line, or none; one copy of the terms to the host for each."""
        if read is not None:
            if self._progress is not None:
                self._progress.say(self._terms.read())
            self._terms.clear()
