"""The step hook: where a training or evaluation step begins for the plugin.

One wrapper around Megatron's forward-backward function. It takes the step's micro-batches from
the data iterators once, removes what stock code must not see, sends the domain labels to every
model-parallel rank, lets rollouts take the places of samples, and where a part of the step reads
them sends which tokens count and where documents begin. It begins those parts (``host.step``:
teachers, losses, retention, what is watched), and then lets the stock schedule run on the very same
micro-batches. No collective of ours runs inside the schedule, except a teacher's when its recipe
asks for a window of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megatron_moe_inject.data import labels as domain_labels
from megatron_moe_inject.data import packed as packing
from megatron_moe_inject.data.labels import HostGroup
from megatron_moe_inject.data.splits import SplitRegistry
from megatron_moe_inject.host.step import MicroBatch, Step, StepPart


class StepHook:
    """Wraps a forward-backward function.

    Args:
        splits: which data each iterator reads.
        host_group: the model-parallel ranks of this rank, for labels.
        iteration: gives the number of optimizer steps taken so far, for schedules.
        parts: what takes part in a step, in the order in which it begins and ends.
        packed: whether samples are packed with documents; see ``data.packed``.
    """

    def __init__(
        self,
        splits: SplitRegistry,
        host_group: HostGroup,
        iteration: Callable[[], int],
        parts: Sequence[StepPart],
        packed: bool = False,
    ) -> None:
        self._splits = splits
        self._host_group = host_group
        self._iteration = iteration
        self.parts = tuple(parts)
        self._packed = packed

    def wrap(self, forward_backward: Callable) -> Callable:
        """What ``train_step`` and ``evaluate`` call in the place of ``forward_backward``."""

        @functools.wraps(forward_backward)
        def wrapped(
            *,
            forward_step_func: Callable,
            data_iterator: Iterator | list[Iterator | None] | None,
            num_microbatches: int,
            micro_batch_size: int,
            seq_length: int,
            **arguments: Any,
        ) -> Any:
            iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
            batches = [domain_labels.pull(it, num_microbatches) for it in iterators]
            step = Step(
                self._labels(iterators, batches, num_microbatches, micro_batch_size),
                [domain_labels.for_stock_code(chunk) for chunk in batches],
                self._iteration(),
                seq_length,
                not arguments.get("forward_only"),
                forward_backward,
                forward_step_func,
                arguments,
                as_read=next((chunk for chunk in batches if chunk is not None), None),
            )
            for part in self.parts:
                part.rewrite(step)
            if any(part.reads_tokens for part in self.parts):
                step.loss_mask, step.starts = self._tokens(step)
            for part in self.parts:
                part.begin(step)
            replay = [None if chunk is None else iter(chunk) for chunk in step.batches]
            try:
                reports = forward_backward(
                    forward_step_func=step.forward_step,
                    data_iterator=replay if isinstance(data_iterator, list) else replay[0],
                    num_microbatches=num_microbatches,
                    micro_batch_size=micro_batch_size,
                    seq_length=seq_length,
                    **step.arguments,
                )
            except Exception as error:
                for part in self.parts:
                    part.failed(error)
                raise
            finally:
                for part in self.parts:
                    part.close()
            for part in self.parts:
                part.end(step, reports)
            return reports

        return wrapped

    def _labels(
        self,
        iterators: Sequence[Iterator | None],
        batches: Sequence[list[MicroBatch] | None],
        num_microbatches: int,
        micro_batch_size: int,
    ) -> torch.Tensor:
        """Labels ``[n, b]`` of the step on this rank; one broadcast, see ``HostGroup``."""
        labels = None
        for iterator, chunk in zip(iterators, batches, strict=True):
            if chunk is not None:
                entries = self._splits.domain_of_entry(iterator)
                labels = domain_labels.domains_of(chunk, entries, micro_batch_size)
                break
        return self._host_group.broadcast_labels(labels, num_microbatches, micro_batch_size)

    def _tokens(self, step: Step) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """``loss_mask`` and ``starts`` of the step; one broadcast, see ``HostGroup``."""
        bits, batches = None, step.micro_batches
        shape = (*step.labels.shape, step.sequence_length)
        if batches is not None:
            told = [packing.counted(batch, shape[1:]) for batch in batches]
            if self._packed:
                told += [packing.starts(batch, shape[1:]) for batch in batches]
            bits = torch.stack(told)
        planes = 2 if self._packed else 1
        mask, *starts = self._host_group.broadcast_bits(bits, (planes * shape[0], *shape[1:])).view(
            planes, *shape
        )
        return None if mask.all() else mask, starts[0] if starts else None
