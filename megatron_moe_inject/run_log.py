"""Writes a run's list (``metrics.run_file``) beside the checkpoints, for ``moe-inject report``.

It has what Megatron logs, when Megatron logs it: the sums that ``training_log`` divides for its
line are remembered as it reads them. So nothing is computed twice and no collective is added. The
last rank writes, which has the losses; of these one more copy to the host is made per line.
"""

from __future__ import annotations

import platform
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject import __version__, compat
from megatron_moe_inject.agreement import agree
from megatron_moe_inject.metrics.run_file import (
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
from megatron_moe_inject.plan import Plan, render_plan
from megatron_moe_inject.recipe import Recipe, RecipeError, dump_recipe
from megatron_moe_inject.student_load import Origin

_TAKEN, _SKIPPED, _NAN = "advanced iterations", "skipped iterations", "nan iterations"


class _Sums(dict):
    """Megatron's sums since its last line; remembers what was read of them last.

    A line resets each sum right after reading it, so afterwards only ``read`` has it.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.read: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        self.read[key] = value = super().__getitem__(key)
        return value


class RunLog:
    """The list of one run.

    Args:
        recipe: with its experts resolved.
        args: Megatron's arguments; ``save`` is the run's folder.
        evaluations: where the run's evaluations go.

    Attributes:
        origin: what was loaded, to be set before ``begin``.
    """

    def __init__(self, recipe: Recipe, args: Namespace, evaluations: Path) -> None:
        self._recipe = recipe
        self._args = args
        self._evaluations = evaluations
        self.path = Path(args.save) / FILE
        self.origin = Origin()
        self._writes = False
        self._seconds = 0.0
        self._shown: dict[str, float] = {}

    def begin(self, plan: Plan) -> None:
        """Begin the list, or go on with it from the iteration that the run resumes from.

        Collectives: those of ``agree``.

        Raises:
            RecipeError: on every rank: the list is damaged or cannot be written.
        """
        self._writes = dist.get_rank() == dist.get_world_size() - 1
        agree(lambda: self._begin(plan) if self._writes else None)

    def _begin(self, plan: Plan) -> None:
        now = compat.optimizer_steps(self._args)
        start = Start(
            iteration=now,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            recipe=dump_recipe(self._recipe),
            plan=render_plan(plan),
            versions={
                "megatron_moe_inject": __version__,
                "megatron-core": compat.megatron_version(),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            parameters=[Component(r.component, r.trained, r.frozen) for r in plan.parameters],
            world_size=dist.get_world_size(),
            evaluations=str(self._evaluations.absolute()),
            train_iters=int(self._args.train_iters or 0),
            loaded=Loaded(**asdict(self.origin)),
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_run(self.path, [*(kept(read_run(self.path), now) if now else []), start])
        self._seconds = compat.seconds_in_steps()

    def log(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        """Megatron's ``training_log``, and a line where it prints one. No collective is added."""
        if not self._writes:
            return stock(*args, **kwargs)
        given = compat.bound_arguments(stock, args, kwargs)
        sums = _Sums(given["total_loss_dict"])
        result = stock(**{**given, "total_loss_dict": sums})
        given["total_loss_dict"].clear()
        given["total_loss_dict"].update(sums)
        first = bool(given.get("is_first_iteration"))
        if first or given["iteration"] % self._args.log_interval == 0:
            step = self._step(given, sums.read)
            # Megatron's first line leaves the sums as they are, for those of the second.
            self._shown = _numbers(sums.read) if first else {}
            try:
                append(self.path, step)
            except RecipeError as error:
                print(f"megatron_moe_inject: warning: report: {error}", flush=True)
        return result

    def _step(self, given: dict[str, Any], read: dict[str, Any]) -> Step:
        now = _numbers(read)
        since = {name: value - self._shown.get(name, 0.0) for name, value in now.items()}
        taken, skipped = int(since.pop(_TAKEN)), int(since.pop(_SKIPPED))
        since.pop(_NAN, None)
        seconds = compat.seconds_in_steps()
        steps, spent = max(1, taken + skipped), seconds - self._seconds
        self._seconds = seconds
        return Step(
            iteration=int(given["iteration"]),
            samples=int(self._args.consumed_train_samples),
            steps=steps,
            skipped=skipped,
            seconds=spent / steps,
            terms={name: finite(value / taken) for name, value in since.items()} if taken else {},
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
