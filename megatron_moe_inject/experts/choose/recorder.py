"""Records how the student's routers distribute tokens, while Megatron trains or evaluates.

What ``RoutingWatch`` saw of a step is added to the classes of its samples. The profile is put
together at the end of the run.

Shapes: n micro-batches of a step, b samples each, l this rank's part of the sequence, L MoE layers
of this rank, E experts, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_moe_inject.experts.choose.router_logits import LogitSample, LogitSampler
from megatron_moe_inject.experts.choose.routing_profile import ClassStatistics, Spread
from megatron_moe_inject.host.labels import GENERAL
from megatron_moe_inject.host.megatron_types import Chunk, Groups
from megatron_moe_inject.host.routing_watch import (
    SUMS,
    RoutingWatch,
)
from megatron_moe_inject.host.step import Step, StepPart
from megatron_moe_inject.host.to_device import to_device


class RoutingRecorder(StepPart):
    """Sums of one rank.

    Args:
        chunks: this rank's bare model chunks.
        classes: number of classes; sample labels count from ``-1``, which is class 0.
        groups: the student's ``ProcessGroupCollection``.
        coselections: also count which experts are chosen together; C L E^2 numbers.
        logits: keep the router logits of at most so many tokens of each class.
        sequence_length: tokens of a sequence, where logits are kept.
        in_training: record the steps that train, instead of those of evaluation.
        packed: whether a micro-batch is one row of its samples; see ``host.own_tokens``.

    Attributes:
        watch: gives the sums of a step.
        steps: how many were recorded.
    """

    reads_tokens = True

    def __init__(
        self,
        chunks: Sequence[Chunk],
        classes: int,
        groups: Groups,
        *,
        coselections: bool = False,
        logits: int | None = None,
        sequence_length: int = 0,
        in_training: bool = True,
        packed: bool = False,
    ) -> None:
        self._in_training = in_training
        self._config = chunks[0].config
        self._device = next(chunks[0].parameters()).device
        self._groups = groups
        self._counts_here = self._config.sequence_parallel or groups.tp.rank() == 0
        self._classes = classes
        self.steps = 0
        each = coselections or logits is not None
        self.watch = RoutingWatch(chunks, groups, self._routed if each else None, packed=packed)
        shape = (classes, len(self.watch.layers), self._config.num_moe_experts)
        self._totals = {name: self._zeros(*shape) for name in SUMS}
        self._share_sums, self._share_squares = self._zeros(*shape), self._zeros(*shape)
        self._sequences = self._zeros(classes)
        self._pairs = self._zeros(*shape, shape[-1]) if coselections else None
        self._sampler: LogitSampler | None = None
        if logits is not None:
            self._sampler = LogitSampler(
                logits,
                classes=classes,
                layers=shape[1],
                experts=shape[-1],
                sequence_length=sequence_length,
                groups=groups,
                sequence_parallel=self._config.sequence_parallel,
                device=self._device,
            )

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self._device)

    def begin(self, step: Step) -> None:
        """Record the step, if it is of the kind that is recorded.

        Collectives: with logits, that of ``LogitSampler.begin``.
        """
        if step.training != self._in_training:
            return
        self._labels = step.labels
        if self._sampler is not None:
            self._sampler.begin(step.labels)
        self.watch.begin(step.labels.shape[0], step.labels.shape[1], step.loss_mask)

    def end(self, step: Step, reports: Any) -> None:
        """Add the step's sequences to their classes.

        Collectives: those of ``RoutingWatch.end``.
        """
        if step.training != self._in_training:
            return
        self.steps += 1
        sums = self.watch.end().double()
        flat = self._labels.flatten()
        text = (flat >= GENERAL).nonzero().flatten()  # answers of pairs are of no class
        label = to_device(flat[text] + 1, self._device)
        sums = sums[:, to_device(text, self._device)]
        for name, values in zip(SUMS, sums, strict=True):
            self._totals[name].index_add_(0, label, values)
        chosen = sums[0]
        share = chosen / chosen.sum(-1, keepdim=True).clamp(min=1)
        self._share_sums.index_add_(0, label, share)
        self._share_squares.index_add_(0, label, share.square())
        self._sequences.index_add_(0, label, torch.ones_like(label, dtype=torch.float64))

    def _routed(
        self,
        micro_batch: int,
        layer: int,
        logits: torch.Tensor,
        chosen: torch.Tensor,
        padding: torch.Tensor | None,
    ) -> None:
        """See ``host.routing_watch.OnRouted``."""
        if self._sampler is not None:
            self._sampler.record(micro_batch, layer, logits, chosen, padding)
        if self._pairs is not None and self._counts_here:
            unpadded = chosen if padding is None else chosen & ~padding.unsqueeze(-1)
            labels = self._labels[micro_batch]
            for label, together in zip(labels.tolist(), self._samples(unpadded), strict=True):
                if label < GENERAL:
                    continue
                self._pairs[label + 1, layer] += together.t() @ together

    def _samples(self, chosen: torch.Tensor) -> Iterator[torch.Tensor]:
        """Each sample's choices ``[l, E]`` in fp32, of ``[l, b, E]`` or a row ``[t, 1, E]``."""
        samples = self._labels.shape[1]
        if chosen.shape[1] == samples:
            yield from chosen.float().unbind(1)
            return
        row = chosen.squeeze(1).float()
        own = to_device(self.watch.tokens.samples_of_row(samples, len(row)), row.device)
        for sample in range(samples):
            yield row * (own == sample).unsqueeze(1)

    def sampled_logits(self) -> list[LogitSample] | None:
        """By class, what was kept of the logits; None where nothing was, and on most ranks.

        Collectives: those of ``LogitSampler.collect``.
        """
        return None if self._sampler is None else self._sampler.collect(self.watch.layers)

    def statistics(self, data: Sequence[tuple[str, ...]]) -> list[ClassStatistics | None]:
        """Everything recorded, of all ranks and layers; None for a class without a sequence.

        Args:
            data: by class, the blend entries that it was read from.

        Collectives: one all-reduce of all sums over the data-parallel group, for co-selections
        over that and the sequence's ranks, and one all-gather over the pipeline group.
        """
        mine = [*self._totals.values(), self._share_sums, self._share_squares]
        whole = torch.stack(mine)
        if self._groups.dp.size() > 1:
            dist.all_reduce(whole, group=self._groups.dp)
            dist.all_reduce(self._sequences, group=self._groups.dp)
        if self._pairs is not None:
            for group in (self._groups.dp, self._groups.tp_cp):
                if group.size() > 1:
                    dist.all_reduce(self._pairs, group=group)
        local = {
            "layers": self.watch.layers,
            "sums": whole.cpu().numpy(),
            "pairs": None if self._pairs is None else self._pairs.cpu().numpy(),
            "sequences": self._sequences.cpu().numpy(),
        }
        stages: list[Any] = [None] * self._groups.pp.size()
        dist.all_gather_object(stages, local, group=self._groups.pp)
        layers = [layer for stage in stages for layer in stage["layers"]]
        order = np.argsort(layers)
        sums = np.concatenate([stage["sums"] for stage in stages], axis=2)[:, :, order]
        pairs = None
        if self._pairs is not None:
            pairs = np.concatenate([stage["pairs"] for stage in stages], axis=1)[:, order]
            pairs[..., np.arange(pairs.shape[-1]), np.arange(pairs.shape[-1])] = 0
        sequences = next(s["sequences"] for s in stages if s["layers"]).astype(np.int64)
        return [self._of_class(c, sums, pairs, sequences, data[c]) for c in range(self._classes)]

    def _of_class(
        self,
        index: int,
        sums: np.ndarray,
        pairs: np.ndarray | None,
        sequences: np.ndarray,
        data: tuple[str, ...],
    ) -> ClassStatistics | None:
        if not sequences[index]:
            return None
        selections, gates, probs, dropped, share_sums, share_squares = sums[:, index]
        selections = np.rint(selections).astype(np.int64)
        capacity = self._config.moe_expert_capacity_factor is not None
        return ClassStatistics(
            data=data,
            tokens=selections.sum(axis=1) // self._config.moe_router_topk,
            selections=selections,
            gate_sums=np.where(selections > 0, gates, 0.0),
            prob_sums=probs,
            spread=Spread(int(sequences[index]), share_sums, share_squares),
            dropped=np.rint(dropped).astype(np.int64) if capacity else None,
            coselections=None if pairs is None else np.rint(pairs[index]).astype(np.int64),
        )
