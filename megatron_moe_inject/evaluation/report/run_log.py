"""Writes a run's list (``run_file``) beside the checkpoints, for ``moe-inject report``.

It has what Megatron logs, when Megatron logs it: the sums that ``training_log`` divides for its
line, as it read them, and our terms. So nothing is computed twice and no collective is added. The
last rank writes, which has the losses; of these two more copies to the host are made per line.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject.evaluation.report.run_file import (
    FILE,
    Component,
    Loaded,
    Start,
    Step,
    append,
    finite,
    kept,
    read_run,
    write_run,
)
from megatron_moe_inject.evaluation.training_evaluator import TrainingEvaluator
from megatron_moe_inject.experts.train.part import Census
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.agreement import agree
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.files import try_file
from megatron_moe_inject.host.version import VERSION
from megatron_moe_inject.recipe.load import dump_recipe
from megatron_moe_inject.recipe.run_part import RunContext, RunPart

_TAKEN, _SKIPPED, _NAN = "advanced iterations", "skipped iterations", "nan iterations"


class RunLog(RunPart):
    """The list of one run, which evaluates while it trains and saves."""

    writes_about = True

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self._recipe = run.recipe
        self._args = run.args
        self._lineage = run.lineage
        self._terms = run.terms.interval()
        run.terms.listeners.append(self.log)
        self.path = Path(run.args.save) / FILE
        self.around = {"train": self._around_training}
        self._writes = False
        self._seconds = 0.0
        self._shown: dict[str, float] = {}

    def try_outputs(self) -> None:
        """The last rank writes the list."""
        if dist.get_rank() == dist.get_world_size() - 1:
            try_file(self.path, "--save")

    def _around_training(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        self.begin()
        return stock(*args, **kwargs)

    def begin(self) -> None:
        """Begin the list, or go on with it from the iteration that the run resumes from, wherever
        it was kept.

        Collectives: those of ``agree``.

        Raises:
            RecipeError: on every rank: the list is damaged or cannot be written.
        """
        self._writes = dist.get_rank() == dist.get_world_size() - 1
        agree(lambda: self._begin() if self._writes else None)
        self._lineage.keep(FILE, self.path)

    def _begin(self) -> None:
        now = compat.optimizer_steps(self._args)
        rows = self._run.need(Census).rows
        injection = self._lineage.identity
        assert injection is not None, "agreed before parts are attached"
        start = Start(
            iteration=now,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            recipe=dump_recipe(self._recipe),
            plan=self._run.plan,
            versions={
                "megatron_moe_inject": VERSION,
                "megatron-core": compat.megatron_version(),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            parameters=[Component(r.component, r.trained, r.frozen) for r in rows],
            world_size=dist.get_world_size(),
            evaluations=str(self._run.need(TrainingEvaluator).path.absolute()),
            train_iters=int(self._args.train_iters or 0),
            injection=injection,
            loaded=Loaded(**asdict(self._run.origin)),
        )
        source = self._lineage.find(self.path, FILE)
        before = [] if source is None else kept(read_run(source), now)
        self._lineage.make_room(self.path)
        write_run(self.path, [*before, start])
        self._seconds = compat.seconds_in_steps()

    def log(self, given: dict[str, Any], read: dict[str, Any] | None) -> None:
        """Add a line where Megatron has printed one. No collective.

        Args:
            given: what ``training_log`` got, by name.
            read: Megatron's sums as it printed them, None without a line.
        """
        if read is None:
            return
        means = self._terms.read() if self._writes else {}
        self._terms.clear()
        if not self._writes:
            return
        step = self._step(given, read, means)
        # Megatron's first line leaves the sums as they are, for those of the second.
        self._shown = _numbers(read) if given.get("is_first_iteration") else {}
        try:
            append(self.path, step)
        except RecipeError as error:
            print(f"megatron_moe_inject: warning: report: {error}", flush=True)

    def _step(self, given: dict[str, Any], read: dict[str, Any], means: dict[str, float]) -> Step:
        now = _numbers(read)
        since = {name: value - self._shown.get(name, 0.0) for name, value in now.items()}
        taken, skipped = int(since.pop(_TAKEN)), int(since.pop(_SKIPPED))
        since.pop(_NAN, None)
        stock = {name: value / taken for name, value in since.items()} if taken else {}
        seconds = compat.seconds_in_steps()
        steps, spent = max(1, taken + skipped), seconds - self._seconds
        self._seconds = seconds
        return Step(
            iteration=int(given["iteration"]),
            samples=int(self._args.consumed_train_samples),
            steps=steps,
            skipped=skipped,
            seconds=spent / steps,
            terms={name: finite(value) for name, value in (means | stock).items()},
            grad_norm=_number(given["grad_norm"]),
            learning_rate=_number(given["learning_rate"]),
        )


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Numbers and one-element tensors as floats, with one copy from the device."""
    tensors = [v.detach().float().reshape(1) for v in values.values() if torch.is_tensor(v)]
    numbers = iter(torch.cat(tensors).tolist() if tensors else ())
    return {n: next(numbers) if torch.is_tensor(v) else float(v) for n, v in values.items()}


def _number(value: Any) -> float | None:
    return None if value is None else finite(float(value))
