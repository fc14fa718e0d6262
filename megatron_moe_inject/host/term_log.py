"""Our terms in Megatron's log: sums over the interval, divided once, by what they are sums over.

Megatron divides a report value ``[sum, count]`` in every step and takes the mean of the quotients
over a log interval. A class with few tokens, or none in some steps, would get a mean of another
kind: a step without a token counts as much as one with many. So our terms leave the reports of a
step before Megatron sees them, are summed over micro-batches and data- and context-parallel ranks
(one all-reduce for all of them, where Megatron makes one for each), and stay on the device as sums
until something is to be written: Megatron's line, TensorBoard and W&B, a run's list, the result of
an evaluation. A term without a token in all that time is not written.

Shapes: K terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject.host import compat
from megatron_moe_inject.host.attached_loss import (
    take_terms,
)
from megatron_moe_inject.host.step import Step, StepPart
from megatron_moe_inject.host.to_device import to_device

CROSS_ENTROPIES = ("lm loss", "teacher loss")
"""Of our terms, by the word before the class: those whose exponential is a perplexity."""
_TAKEN = "advanced iterations"


class Interval:
    """Sums ``[K, 2]`` of terms since they were read last, in float64 on the device."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: torch.Tensor | None = None

    def add(self, names: list[str], values: torch.Tensor | None) -> None:
        """Add a step's sums ``[K, 2]``, or none. No device synchronisation."""
        if values is None:
            return
        if self._sums is None:
            self._names, self._sums = names, values.double()
        elif names == self._names:
            self._sums = self._sums + values
        else:  # a term that not every step has
            both = list(dict.fromkeys((*self._names, *names)))
            places = torch.tensor([both.index(name) for name in (*self._names, *names)])
            rows = torch.cat([self._sums, values.double()])
            whole = rows.new_zeros(len(both), 2)
            places = to_device(places, rows.device)
            self._names, self._sums = both, whole.index_add(0, places, rows)

    def read(self) -> dict[str, float]:
        """Mean of each term that has something to be a mean of; one copy to the host."""
        if self._sums is None:
            return {}
        sums = self._sums.tolist()
        return {
            name: total / count
            for name, (total, count) in zip(self._names, sums, strict=True)
            if count > 0
        }

    def clear(self) -> None:
        """Begin anew."""
        self._names, self._sums = [], None


class _Line(dict):
    """Megatron's sums since its last line, with what the line is to say of our terms.

    Megatron adds a step's terms to its sums, prints each over the number of steps, and resets it.
    What it sets of ours has no effect. What it read last of its own is kept, before the reset.

    Args:
        sums: Megatron's.
        terms: what it is to print of ours, times the number of steps.
        own: names of ours, which may be more.
    """

    def __init__(
        self, sums: Mapping[str, Any], terms: Mapping[str, torch.Tensor], own: Iterable[str]
    ) -> None:
        super().__init__({**terms, **sums})
        self._own = frozenset(own)
        self.read: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if key not in self._own:
            self.read[key] = value
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self._own:
            super().__setitem__(key, value)

    def stock(self) -> dict[str, Any]:
        """Megatron's sums alone."""
        return {name: value for name, value in self.items() if name not in self._own}


class _Means(dict):
    """What an evaluation found: Megatron's own means and ours.

    Megatron prints what it iterates over, each number also as a perplexity. Of ours that makes
    sense of cross-entropies alone, so the others are passed over, and printed behind its line.
    """

    def __init__(self, own: Mapping[str, Any], terms: Mapping[str, Any]) -> None:
        super().__init__({**terms, **own})
        self.beside = {
            name: value
            for name, value in terms.items()
            if name not in own and name.partition("/")[0] not in CROSS_ENTROPIES
        }

    def __iter__(self) -> Iterator[str]:
        return (name for name in super().__iter__() if name not in self.beside)


class TermLog:
    """The terms of one run on this rank.

    Args:
        args: Megatron's arguments, for its intervals.

    Attributes:
        listeners: are called after each ``training_log`` with its arguments by name and what
            Megatron printed of its own sums, None without a line.
    """

    def __init__(self, args: Any) -> None:
        self._args = args
        self._step: tuple[list[str], torch.Tensor | None] = ([], None)
        self._line, self._board, self._evaluation = Interval(), Interval(), Interval()
        self._others: list[Interval] = []
        self._beside: list[Mapping[str, torch.Tensor]] = []  # of each validation set
        self.listeners: list[Callable[[dict[str, Any], dict[str, Any] | None], None]] = []

    def interval(self) -> Interval:
        """Sums for one more reader, who clears them."""
        self._others.append(Interval())
        return self._others[-1]

    def end_step(self, reports: Any, groups: Any, *, evaluation: bool) -> None:
        """Take the terms out of what a schedule returned.

        Args:
            reports: on the last stage, one dictionary per micro-batch; else nothing is done.
            groups: the student's ``ProcessGroupCollection``.

        Collectives: on the last stage, one all-reduce of 2 K float32 over the data- and
        context-parallel ranks, of which all have the same terms.
        """
        names, sums = take_terms(reports)
        if sums is not None:
            group = getattr(groups, "dp_cp_gtp_remat", None) or groups.dp_cp  # as Megatron's own
            if group.size() > 1:
                dist.all_reduce(sums, group=group)
        if evaluation:
            self._evaluation.add(names, sums)
        else:
            self._step = names, sums

    def log(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        """Megatron's ``training_log`` with our terms in it.

        No collective. The host waits where Megatron's own code does: for a line, and on the rank
        that writes TensorBoard's numbers for these.
        """
        bound = compat.bound_arguments(stock, args, kwargs)
        result, read = self._log(stock, bound)
        for listener in self.listeners:
            listener(bound, read)
        return result

    def _log(self, stock: Callable, given: dict[str, Any]) -> tuple[Any, dict[str, Any] | None]:
        step, self._step = self._step, ([], None)
        self._board.add(*step)
        if not given["skipped_iter"]:
            for interval in (self._line, *self._others):
                interval.add(*step)
        iteration, sums = given["iteration"], given["total_loss_dict"]
        first = bool(given.get("is_first_iteration"))
        printed = first or iteration % self._args.log_interval == 0
        scalars: dict[str, torch.Tensor] = {}
        if iteration % self._args.tensorboard_log_interval == 0:
            if printed or _writes_scalars():
                scalars = {name: _scalar(mean) for name, mean in self._board.read().items()}
            self._board.clear()
        means = self._line.read() if printed else {}
        steps = max(1, sums.get(_TAKEN, 0) + (not given["skipped_iter"]))
        terms = {name: _scalar(mean * steps) for name, mean in means.items()}
        line = _Line(sums, terms, (*means, *scalars))
        result = stock(
            **{**given, "loss_dict": {**scalars, **given["loss_dict"]}, "total_loss_dict": line}
        )
        sums.clear()
        sums.update(line.stock())
        if printed and not first:  # Megatron's first line leaves the sums for the second
            self._line.clear()
        return result, line.read if printed else None

    def evaluate(self, stock: Callable, *args: Any, **kwargs: Any) -> tuple:
        """Megatron's ``evaluate``, whose result ``(means, ...)`` gets ours. No collective."""
        self._evaluation.clear()
        result = stock(*args, **kwargs)
        means, *rest = result
        if means is None:  # the time was up
            return result
        ours = {name: _scalar(mean) for name, mean in self._evaluation.read().items()}
        all_means = _Means(means, ours)
        self._beside.append(all_means.beside)
        return (all_means, *rest)

    def print_evaluation(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        """Megatron's ``evaluate_and_print_results``, and behind its lines our terms that have no
        perplexity, under the names that it would give them. No collective."""
        bound = compat.bound_arguments(stock, args, kwargs)
        self._beside = []
        result = stock(*args, **kwargs)
        sets, self._beside = self._beside, []
        for place, terms in enumerate(sets):
            if not terms:
                continue
            numbers = {name: value.item() for name, value in terms.items()}
            self.print_held_out(f"validation{self._set_suffix(place)}", numbers, bound)
        return result

    def print_held_out(
        self, of_set: str, numbers: Mapping[str, float], given: Mapping[str, Any]
    ) -> None:
        """Log numbers of an evaluation in the form of Megatron's, without perplexities. No
        collective.

        Args:
            of_set: what Megatron calls the data, such as ``validation``.
            numbers: by name.
            given: arguments of ``evaluate_and_print_results`` by name.
        """
        if dist.get_rank() == dist.get_world_size() - 1:
            text = " | ".join(f"{name} value: {value:.6E}" for name, value in numbers.items())
            print(f" {of_set} loss at {given['prefix']} | {text} |", flush=True)
        if given.get("write_to_tensorboard", True):
            named = {f"{name} {of_set}": value for name, value in numbers.items()}
            _write_validation(named, given["iteration"], self._args.consumed_train_samples)

    def _set_suffix(self, place: int) -> str:
        """What Megatron adds to the names of one of several validation sets."""
        if not getattr(self._args, "multiple_validation_sets", False):
            return ""
        names = self._args.validation_set_names
        return f"-{names[place]}" if names else f"-{place}"


class TermStep(StepPart):
    """Takes the terms out of what each step returned, after all parts that report some.

    Args:
        terms: of the run.
        groups: the student's ``ProcessGroupCollection``.
    """

    def __init__(self, terms: TermLog, groups: Any) -> None:
        self._terms = terms
        self._groups = groups

    def end(self, step: Step, reports: Any) -> None:
        """Collectives: those of ``TermLog.end_step``."""
        self._terms.end_step(reports, self._groups, evaluation=not step.training)


def _scalar(value: float) -> torch.Tensor:
    """Megatron reads its numbers from tensors; one of the host costs the device nothing."""
    return torch.tensor(value, dtype=torch.float64)


def _writes_scalars() -> bool:
    """Whether this rank writes Megatron's numbers for TensorBoard, and with them W&B's."""
    from megatron.training import get_tensorboard_writer

    return get_tensorboard_writer() is not None


def _write_validation(numbers: Mapping[str, float], iteration: int, samples: int) -> None:
    """To TensorBoard and W&B, on the rank that has them; by Megatron's names of what is shown."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    writer, wandb = get_tensorboard_writer(), get_wandb_writer()
    if writer is None:  # Megatron writes to W&B only beside TensorBoard
        return
    for name, value in numbers.items():
        writer.add_scalar(name, value, iteration)
        writer.add_scalar(f"{name} vs samples", value, samples)
    if wandb is not None:
        wandb.log(dict(numbers), iteration)
