"""The step hook: where a training or evaluation step begins for the plugin.

One wrapper around Megatron's forward-backward function. It takes the step's micro-batches from
the data iterators once, removes what stock code must not see, sends the domain labels to every
model-parallel rank, runs the teachers on the last pipeline stage, and then lets the stock
schedule run on the very same micro-batches, through a communicator that leaves out the gradients
that no stage needs. No collective of ours runs inside the schedule, except a teacher's when its
recipe asks for a window of micro-batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megatron_moe_inject.data import labels as domain_labels
from megatron_moe_inject.data.labels import HostGroup, MicroBatch
from megatron_moe_inject.evaluation.measurement import Measurement
from megatron_moe_inject.experts.choose.recorder import RoutingRecorder
from megatron_moe_inject.experts.train.pipeline import BoundaryCommunicator
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.finite import FiniteWatch
from megatron_moe_inject.host.term_log import TermLog
from megatron_moe_inject.loss_hook import LossHook
from megatron_moe_inject.retention.original_pass import OriginalPass
from megatron_moe_inject.retention.setup import RetentionStep
from megatron_moe_inject.routing.setup import RoutingStep
from megatron_moe_inject.teachers.imitation.hook import ImitationHook


class SplitRegistry:
    """Remembers which split each data iterator reads, and the domain of its blend's entries.

    Megatron hands the step only iterators; training and validation blends may differ.

    Args:
        by_split: by split (``train``, ``valid``, ``test``), the domain index or ``GENERAL`` of each
            entry of the split's blend.
    """

    def __init__(self, by_split: dict[str, list[int]]) -> None:
        self.by_split = by_split
        self._by_iterator: dict[int, list[int]] = {}

    def register(self, train: Any, valid: Any, test: Any) -> None:
        """Record what ``build_train_valid_test_data_iterators`` returned, once per model chunk."""
        for split, iterator in (("train", train), ("valid", valid), ("test", test)):
            if iterator is not None:
                self._by_iterator[id(iterator)] = self.by_split[split]

    def domain_of_entry(self, iterator: Any) -> list[int]:
        """Domain index or ``GENERAL`` by blend entry, of the data that ``iterator`` reads."""
        return self._by_iterator[id(iterator)]


class StepHook:
    """Wraps a forward-backward function.

    Args:
        splits: which data each iterator reads.
        host_group: the model-parallel ranks of this rank, for labels.
        loss_hook: the loss of the last pipeline stage, ``None`` on other stages.
        iteration: gives the number of optimiser steps taken so far, for schedules.
        original_pass: the original model's forward, ``None`` without retention.
        imitation: losses on layers, ``None`` without feature imitation.
        recorder: counts routing in the steps of training, ``None`` without a profile.
        records_evaluation: count in evaluation instead.
        routing: steers tokens and reports where they go.
        retention: holds experts and parameters to their start, ``None`` without.
        communicator: what pipeline stages talk through in training steps, ``None`` for Megatron's.
        measurement: measures evaluations, ``None`` without.
        watch: says in an error of the step what was not finite.
        terms: logs what the parts above report, ``None`` where they report nothing.
        groups: the student's ``ProcessGroupCollection``, with ``terms``.

    Attributes:
        after_step: called when a step has ended.
    """

    def __init__(
        self,
        splits: SplitRegistry,
        host_group: HostGroup,
        loss_hook: LossHook | None,
        iteration: Callable[[], int],
        original_pass: OriginalPass | None = None,
        imitation: ImitationHook | None = None,
        recorder: RoutingRecorder | None = None,
        records_evaluation: bool = False,
        routing: RoutingStep | None = None,
        communicator: BoundaryCommunicator | None = None,
        measurement: Measurement | None = None,
        watch: FiniteWatch | None = None,
        retention: RetentionStep | None = None,
        terms: TermLog | None = None,
        groups: Any = None,
    ) -> None:
        self._terms = terms
        self._groups = groups
        self._watch = watch
        self._splits = splits
        self._host_group = host_group
        self._loss_hook = loss_hook
        self._iteration = iteration
        self._original_pass = original_pass
        self._imitation = imitation
        self._recorder = recorder
        self._records_evaluation = records_evaluation
        self._routing = routing
        self._communicator = communicator
        self.after_step: Callable[[], None] = lambda: None
        self._measurement = measurement
        self._retention = retention

    def wrap(self, forward_backward: Callable) -> Callable:
        """What ``train_step`` and ``evaluate`` call in the place of ``forward_backward``."""

        @functools.wraps(forward_backward)
        def step(
            *,
            forward_step_func: Callable,
            data_iterator: Iterator | list[Iterator | None] | None,
            num_microbatches: int,
            micro_batch_size: int,
            seq_length: int,
            **kwargs,
        ):
            iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
            batches = [domain_labels.pull(it, num_microbatches) for it in iterators]
            labels = self._labels(iterators, batches, num_microbatches, micro_batch_size)
            clean = [domain_labels.without_dataset_id(chunk) for chunk in batches]
            if self._measurement is not None and self._measurement.active:
                self._measurement.begin_step(_first(clean))
            if self._loss_hook is not None:
                forward_step_func = self._loss_hook.wrap_forward_step(forward_step_func)
                self._loss_hook.begin(labels, self._iteration())
                self._run_teachers(labels, clean, seq_length)
            if self._original_pass is not None:
                self._original_pass.run(
                    forward_backward,
                    labels,
                    clean,
                    forward_step_func=forward_step_func,
                    seq_length=seq_length,
                    **kwargs,
                )
            if self._imitation is not None:
                self._begin_imitation(labels, clean, seq_length)
            evaluation = bool(kwargs.get("forward_only"))
            recorder = self._recorder if evaluation == self._records_evaluation else None
            if recorder is not None:
                recorder.begin(labels)
            if self._routing is not None:
                sure = None
                if self._routing.confidence != "none" and self._loss_hook is not None:
                    sure = self._loss_hook.confidences(self._routing.confidence, labels)
                self._routing.begin(labels, self._iteration(), seq_length, sure)
            if self._watch is not None:
                self._watch.begin(self._iteration())
            if self._retention is not None:
                self._retention.begin(labels, self._iteration(), seq_length)
            replay = [None if chunk is None else iter(chunk) for chunk in clean]
            communicator = None if evaluation else self._communicator
            if communicator is not None:
                kwargs |= communicator.begin(num_microbatches, kwargs.get("p2p_communicator"))
            try:
                reports = forward_backward(
                    forward_step_func=forward_step_func,
                    data_iterator=replay if isinstance(data_iterator, list) else replay[0],
                    num_microbatches=num_microbatches,
                    micro_batch_size=micro_batch_size,
                    seq_length=seq_length,
                    **kwargs,
                )
            except Exception as error:
                self._explain(error)
                raise
            finally:
                if self._loss_hook is not None:
                    self._loss_hook.end()
            if self._watch is not None and compat.step_was_rejected():
                self._watch.say()
            if communicator is not None:
                communicator.end()
            if self._imitation is not None:
                self._imitation.end(reports)
            if self._routing is not None:
                self._routing.end(reports, trained=not evaluation)
            if self._retention is not None:
                self._retention.end(reports, trained=not evaluation)
            if self._terms is not None:
                self._terms.end_step(reports, self._groups, evaluation=evaluation)
            if recorder is not None:
                recorder.end()
            self.after_step()
            return reports

        return step

    def _explain(self, error: Exception) -> None:
        """Add to an error that ends a step what was not finite in it."""
        try:
            found = None if self._watch is None else self._watch.found()
        except RuntimeError:  # the device itself is gone
            return
        if found is not None:
            error.add_note(found)

    def _labels(
        self,
        iterators: Sequence[Iterator | None],
        batches: Sequence[list[MicroBatch] | None],
        num_microbatches: int,
        micro_batch_size: int,
    ) -> torch.Tensor:
        """Labels ``[n, b]`` of the step on this rank; one broadcast, see ``HostGroup``."""
        own = None
        for iterator, chunk in zip(iterators, batches, strict=True):
            if chunk is not None:
                entries = self._splits.domain_of_entry(iterator)
                own = domain_labels.domains_of(chunk, entries, micro_batch_size)
                break
        return self._host_group.broadcast_labels(own, num_microbatches, micro_batch_size)

    def _run_teachers(
        self,
        labels: torch.Tensor,
        batches: Sequence[list[MicroBatch] | None],
        sequence_length: int,
    ) -> None:
        own = _first(batches)
        for teacher in self._loss_hook.teachers:
            domains = torch.tensor(self._loss_hook.taught_by(teacher))
            teacher.begin(
                own, torch.isin(labels, domains), sequence_length,
                bare=self._loss_hook.compares_prefix,
            )  # fmt: skip

    def _begin_imitation(
        self,
        labels: torch.Tensor,
        batches: Sequence[list[MicroBatch] | None],
        sequence_length: int,
    ) -> None:
        passes = {}
        if self._loss_hook is not None:
            passes = {run.teacher.name: run for run in self._loss_hook.teachers}
        own = _first(batches)
        self._imitation.begin(passes, own, labels, self._iteration(), sequence_length)


def _first(batches: Sequence[list[MicroBatch] | None]) -> list[MicroBatch] | None:
    """The step's micro-batches from whichever model chunk reads data."""
    return next((chunk for chunk in batches if chunk is not None), None)
