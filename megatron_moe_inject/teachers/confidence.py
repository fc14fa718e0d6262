"""How sure a domain's teacher is: of every token ahead of the step, or by a running mean.

A teacher that runs the whole step ahead knows its confidence in every token before the schedule
starts. One whose states come by windows does not, so its domains have one number instead: the mean
confidence in their tokens of earlier steps. It is measured on the last pipeline stage while the
schedule runs and agreed at the step's end, so every rank uses the same bits in the next one.

Shapes: n micro-batches, b samples each, s sequence, c context-parallel size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject.host.indices import index
from megatron_moe_inject.losses.measure import target_confidence
from megatron_moe_inject.losses.objective import SampleGroup
from megatron_moe_inject.losses.rows import RowKernels
from megatron_moe_inject.losses.student import Vocabulary
from megatron_moe_inject.losses.target import Target
from megatron_moe_inject.losses.triton_rows import AUTO
from megatron_moe_inject.teachers.step_pass import DomainTeacher

LATEST = 0.01
"""Least weight of the latest step in a running mean: all steps weigh alike up to the hundredth."""


def confidences(
    own: DomainTeacher,
    kind: str,
    wanted: torch.Tensor,
    vocabulary: Vocabulary,
    *,
    kernels: RowKernels | str | None = AUTO,
) -> torch.Tensor:
    """How sure a domain's teacher, or the mixture of several, is at each position, ``[k, s/c]``.

    Args:
        own: the teacher or teachers.
        kind: ``label``, the probability of the next token, 0 at the last position, where the
            teacher's input does not hold that; or ``top``, that of the most likely token. Both are
            0 where a teacher lacks a token of the text so far.
        wanted: ``[n, b]`` bool on the host, samples of the step; all that they teach or fewer.
        vocabulary: the student's, by which the teachers' heads are sharded.
        kernels: see ``losses.FusedOptions``.

    Returns:
        fp32, for the k samples in order.

    Needs the whole step at once (``window`` 0). Collectives: those of ``target_confidence``.
    """
    first = own.passes[0]
    tokens, targets = zip(*(teacher.of_step(wanted) for teacher in own.passes), strict=True)
    target = own.together(targets)
    labels = first.next_tokens(tokens[0]).view(target.tokens)
    confidence = _sure(kind, target, labels, vocabulary, kernels)
    for teacher in own.passes:
        readable = teacher.readable_of_step(wanted)
        confidence = confidence if readable is None else confidence * readable
    return confidence


def _sure(
    kind: str,
    target: Target,
    labels: torch.Tensor,
    vocabulary: Vocabulary,
    kernels: RowKernels | str | None,
) -> torch.Tensor:
    """``target_confidence`` of samples: tensors per token ``[k, s/c, ...]`` and labels ``[k, s/c]``
    to fp32 ``[k, s/c]``."""
    flat = target.changed(lambda tensor: tensor.flatten(0, 1))
    confidence = target_confidence(flat, kind, labels.flatten(), vocabulary, kernels=kernels)
    return confidence.float().view(labels.shape)


class RunningConfidence:
    """Mean confidence of the teachers of some domains over earlier steps, the same on all ranks.

    A domain has 1 until its first tokens were seen. The mean of the n-th step that had tokens of
    it then counts ``max(1 / n, LATEST)``, the mean so far the rest. A step that runs again at the
    same iteration, as Megatron's rerun machinery lets it, uses the same means again.

    Args:
        kind: ``label``, with the batch's labels, or ``top``, as of ``confidences``.
        domains: names by domain index.
        state: of ``state`` when a run goes on: by name the mean and the number of steps.
        keep: gets the state after each step, in plain JSON values.
    """

    def __init__(
        self,
        kind: str,
        domains: Mapping[int, str],
        state: Mapping[str, Sequence[float]] | None = None,
        keep: Callable[[dict[str, list[float]]], None] = lambda state: None,
    ) -> None:
        self._kind = kind
        self._domains = dict(domains)
        self._keep = keep
        stored = state or {}
        self._next = {i: _checked(stored.get(name, (1.0, 0))) for i, name in self._domains.items()}
        self._now = self._next
        self._iteration: int | None = None
        self._sums: torch.Tensor | None = None

    @property
    def means(self) -> dict[int, float]:
        """The means of this step, by domain index."""
        return {index: mean for index, (mean, _) in self._now.items()}

    @property
    def state(self) -> dict[str, list[float]]:
        """What the next step begins with, by name the mean and the number of steps."""
        return {self._domains[index]: list(pair) for index, pair in self._next.items()}

    def begin(self, iteration: int) -> None:
        """Start a step after that many optimizer steps, or an evaluation."""
        if iteration != self._iteration:
            self._iteration, self._now = iteration, self._next
        self._sums = None

    def add(
        self,
        groups: Sequence[SampleGroup],
        labels: torch.Tensor,
        domains: Sequence[int],
        vocabulary: Vocabulary,
        *,
        loss_mask: torch.Tensor | None = None,
        kernels: RowKernels | str | None = AUTO,
    ) -> None:
        """Measure a micro-batch of a training step, on the last pipeline stage.

        Args:
            groups: its samples with what their teachers say of them.
            labels: ``[b, s/c]``.
            domains: index or ``GENERAL`` of the b samples.
            vocabulary: the student's.
            loss_mask: ``[b, s/c]``, tokens that count; None for all.
            kernels: see ``losses.FusedOptions``.

        Collectives: those of ``target_confidence``, for each group with such a domain. The ranks
        that share a sequence have the same groups.
        """
        for group in groups:
            target = group.target
            if target is not None and any(domains[i] in self._domains for i in group.samples):
                self._add(group, target, labels, domains, vocabulary, loss_mask, kernels)

    def _add(
        self,
        group: SampleGroup,
        target: Target,
        labels: torch.Tensor,
        domains: Sequence[int],
        vocabulary: Vocabulary,
        loss_mask: torch.Tensor | None,
        kernels: RowKernels | str | None,
    ) -> None:
        samples = list(group.samples)
        places = index(samples, labels.device)
        labels = labels.index_select(0, places)
        confidence = _sure(self._kind, target, labels, vocabulary, kernels)
        if self._sums is None:
            self._sums = confidence.new_zeros(len(self._domains), 2, dtype=torch.float64)
        rows = {domain: row for row, domain in enumerate(self._domains)}
        readable = torch.ones_like(confidence) if group.readable is None else group.readable
        if loss_mask is not None:
            readable = readable * loss_mask.index_select(0, places)
        sums = torch.stack(
            [(confidence * readable).double().sum(1), readable.double().sum(1)], dim=1
        )
        for sample, value in zip(samples, sums, strict=True):
            if domains[sample] in rows:
                self._sums[rows[domains[sample]]] += value

    def end(self, device: torch.device) -> None:
        """Finish a training step: agree on what was measured, for the next one.

        Collectives: one all-reduce of 2 fp64 numbers per domain over the whole world.
        """
        sums = self._sums
        if sums is None:
            sums = torch.zeros(len(self._domains), 2, dtype=torch.float64, device=device)
        if dist.is_initialized():
            dist.all_reduce(sums)
        self._next = {
            index: _updated(pair, total / tokens) if tokens else pair
            for (index, pair), (total, tokens) in zip(self._now.items(), sums.tolist(), strict=True)
        }
        self._sums = None
        self._keep(self.state)


def _updated(pair: tuple[float, int], latest: float) -> tuple[float, int]:
    mean, steps = pair[0], pair[1] + 1
    weight = max(1 / steps, LATEST)
    return (1 - weight) * mean + weight * latest, steps


def _checked(pair: Any) -> tuple[float, int]:
    """A stored mean; ValueError if it is none."""
    mean, steps = float(pair[0]), int(pair[1])
    if not (math.isfinite(mean) and mean >= 0 and steps >= 0):
        raise ValueError(f"{pair} is no mean of probabilities and number of steps")
    return mean, steps
