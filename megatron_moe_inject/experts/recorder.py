"""Records how the student's routers distribute tokens, while Megatron trains or evaluates.

Each router's ``routing`` is wrapped: what it decided is summed over the positions of each sequence
where it runs, without a copy of the tokens and without waiting for the device. At the end of a step
the sums of a sequence are completed over the ranks that hold its parts, and added to its class. The
profile is put together at the end of the run. Activations that are recomputed are counted once.

Shapes: n micro-batches of a step, b samples each, l this rank's part of the sequence, L MoE layers
of this rank, E experts, C classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_moe_inject.clock import ChunkClock
from megatron_moe_inject.experts.freeze import decoder_layers
from megatron_moe_inject.experts.router_logits import LogitSample, LogitSampler
from megatron_moe_inject.experts.routing_profile import ClassStatistics, Spread

_SUMS = ("selections", "gate_sums", "prob_sums", "dropped")


class RoutingRecorder:
    """Sums of one rank.

    Args:
        chunks: this rank's bare model chunks.
        classes: number of classes; sample labels count from ``-1``, which is class 0.
        groups: the student's ``ProcessGroupCollection``.
        coselections: also count which experts are chosen together; C L E^2 numbers.
        logits: keep the router logits of at most so many tokens of each class.
        sequence_length: tokens of a sequence, where logits are kept.

    Attributes:
        layers: 0-based MoE layers of this rank, in the order of the sums.
        steps: how many were recorded.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        classes: int,
        groups: Any,
        *,
        coselections: bool = False,
        logits: int | None = None,
        sequence_length: int = 0,
    ) -> None:
        self._config = chunks[0].config
        self._device = next(chunks[0].parameters()).device
        self._groups = groups
        self._sequence_group = groups.tp_cp if self._config.sequence_parallel else groups.cp
        self._counts_here = self._config.sequence_parallel or groups.tp.rank() == 0
        self._classes = classes
        self._active = False
        self._clocks: list[ChunkClock] = []
        self.layers: list[int] = []
        self.steps = 0
        for chunk in chunks:
            clock = ChunkClock(chunk)
            self._clocks.append(clock)
            for layer in decoder_layers(chunk):
                router = getattr(layer.mlp, "router", None)
                if router is not None:
                    watch = functools.partial(self._routing, clock, len(self.layers), router)
                    router.routing = functools.partial(watch, router.routing)
                    self.layers.append(layer.layer_number - 1)
        shape = (classes, len(self.layers), self._config.num_moe_experts)
        self._totals = {name: self._zeros(*shape) for name in _SUMS}
        self._share_sums, self._share_squares = self._zeros(*shape), self._zeros(*shape)
        self._sequences = self._zeros(classes)
        self._pairs = self._zeros(*shape, shape[-1]) if coselections else None
        self._sampler: LogitSampler | None = None
        if logits is not None:
            self._sampler = LogitSampler(
                logits,
                classes=classes,
                layers=len(self.layers),
                experts=shape[-1],
                sequence_length=sequence_length,
                groups=groups,
                sequence_parallel=self._config.sequence_parallel,
                device=self._device,
            )

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self._device)

    def begin(self, labels: torch.Tensor) -> None:
        """Record the step whose micro-batches have these labels, ``[n, b]`` on the host.

        Collectives: with logits, that of ``LogitSampler.begin``.
        """
        self._labels = labels
        if self._sampler is not None:
            self._sampler.begin(labels)
        n, b = labels.shape
        experts = self._config.num_moe_experts
        self._step = torch.zeros(
            len(_SUMS), n, b, len(self.layers), experts, dtype=torch.float32, device=self._device
        )
        for clock in self._clocks:
            clock.reset()
        self._active = True

    def end(self) -> None:
        """Complete the step's sequences and add them to their classes.

        Collectives: one all-reduce of 4 n b L E float32 over the ranks that share sequences (TP x
        CP under sequence parallelism, else CP).
        """
        self._active = False
        self.steps += 1
        if self._sequence_group.size() > 1:
            dist.all_reduce(self._step, group=self._sequence_group)
        sums = self._step.flatten(1, 2).double()
        label = (self._labels.flatten() + 1).to(self._device, non_blocking=True)
        for name, values in zip(_SUMS, sums, strict=True):
            self._totals[name].index_add_(0, label, values)
        chosen = sums[0]
        share = chosen / chosen.sum(-1, keepdim=True).clamp(min=1)
        self._share_sums.index_add_(0, label, share)
        self._share_squares.index_add_(0, label, share.square())
        self._sequences.index_add_(0, label, torch.ones_like(label, dtype=torch.float64))

    def _routing(
        self,
        clock: ChunkClock,
        layer: int,
        router: torch.nn.Module,
        stock: Callable,
        logits: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``TopKRouter.routing``: logits ``[l, b, E]`` to gates and choices ``[l b, E]``."""
        gates, chosen = stock(logits, *args, **kwargs)
        if self._active and clock.inside:
            with torch.no_grad():
                padding = kwargs.get("padding_mask", args[0] if args else None)
                self._record(clock.micro_batch, layer, router, logits, gates, chosen, padding)
        return gates, chosen

    def _record(
        self,
        micro_batch: int,
        layer: int,
        router: torch.nn.Module,
        logits: torch.Tensor,
        gates: torch.Tensor,
        chosen: torch.Tensor,
        padding: torch.Tensor | None,
    ) -> None:
        length, samples, experts = logits.shape
        before = chosen
        if self._config.moe_expert_capacity_factor is not None:
            before = _without_dropping(router, logits.detach())
        scores = _scores(logits.detach(), self._config.moe_router_score_function)
        values = [before.float(), gates.detach().float(), scores, (before & ~chosen).float()]
        rows = [value.view(length, samples, experts) for value in values]
        if padding is not None:
            kept = (~padding).view(length, samples, 1)
            rows = [value * kept for value in rows]
        for place, value in zip(self._step[:, micro_batch, :, layer], rows, strict=True):
            torch.sum(value, 0, out=place)
        if self._sampler is not None:
            before = before.view(length, samples, experts)
            if padding is not None:
                padding = padding.view(length, samples)
            self._sampler.record(micro_batch, layer, logits.detach(), before, padding)
        if self._pairs is not None and self._counts_here:
            for sample, label in enumerate(self._labels[micro_batch].tolist()):
                together = rows[0][:, sample]
                self._pairs[label + 1, layer] += together.t() @ together

    def sampled_logits(self) -> list[LogitSample] | None:
        """By class, what was kept of the logits; None where nothing was, and on most ranks.

        Collectives: those of ``LogitSampler.collect``.
        """
        return None if self._sampler is None else self._sampler.collect(self.layers)

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
        own = {
            "layers": self.layers,
            "sums": whole.cpu().numpy(),
            "pairs": None if self._pairs is None else self._pairs.cpu().numpy(),
            "sequences": self._sequences.cpu().numpy(),
        }
        stages: list[Any] = [None] * self._groups.pp.size()
        dist.all_gather_object(stages, own, group=self._groups.pp)
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


def _scores(logits: torch.Tensor, score_function: str) -> torch.Tensor:
    """Scores over all experts, 1 per token in sum, as Megatron's balance losses take them."""
    if score_function == "softmax":
        return logits.float().softmax(-1)
    raw = logits.float().sigmoid()
    if score_function == "sqrtsoftplus":
        raw = torch.nn.functional.softplus(logits.float()).sqrt()
    return raw / (raw.sum(-1, keepdim=True) + 1e-20)


def _without_dropping(router: torch.nn.Module, logits: torch.Tensor) -> torch.Tensor:
    """What the router chooses before its capacity drops anything, ``[l b, E]`` bool."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    config = router.config
    _, chosen = topk_routing_with_score_function(
        logits.reshape(-1, logits.shape[-1]),
        router.topk,
        use_pre_softmax=config.moe_router_pre_softmax,
        num_groups=config.moe_router_num_groups,
        group_topk=config.moe_router_group_topk,
        scaling_factor=config.moe_router_topk_scaling_factor,
        score_function=router.score_function,
        expert_bias=router.expert_bias,
        fused=config.moe_router_fusion,
    )
    return chosen
