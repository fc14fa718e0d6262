"""Watches what the student's routers decide, while Megatron trains or evaluates.

Each router's ``routing`` is wrapped: what it decided is summed over the positions of each sequence
where it runs, without a copy of the tokens and without waiting for the device. Only tokens whose
loss counts are summed. At the end of a step the sums of a sequence are completed over the ranks
that hold its parts. Activations that are recomputed are counted once. Routers of
multi-token-prediction layers are not watched.

Shapes: n micro-batches of a step, b samples each, l this rank's part of the sequence, L MoE layers
of this rank, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_moe_inject.host.clock import ChunkClock
from megatron_moe_inject.host.megatron_types import Chunk, Groups, MegatronModule
from megatron_moe_inject.host.model_parts import routers
from megatron_moe_inject.host.own_tokens import OwnTokens
from megatron_moe_inject.host.to_device import to_device
from megatron_moe_inject.host.uses import WATCHED_ROUTING
from megatron_moe_inject.host.wrap import Call, wrap_method

SUMS = ("selections", "gate_sums", "prob_sums", "dropped")
"""Choices before capacity drops, gate weights, probabilities (``router_distribution``), and
choices that were dropped."""


OnRouted = Callable[[int, int, torch.Tensor, torch.Tensor, torch.Tensor | None], None]
"""Gets the micro-batch, the layer's place, logits and bool choices ``[l, b, E]`` before drops, and
where ``[l, b]`` is not to be counted, padding and what the loss does not count, if there is any; of
a row of packed samples ``[t, 1, E]`` and ``[t, 1]``."""


class RoutingWatch:
    """Sums of one rank's routers, step by step.

    Args:
        chunks: this rank's bare model chunks.
        groups: the student's ``ProcessGroupCollection``.
        on_routed: also called for every layer and micro-batch.
        packed: whether a micro-batch is one row of its samples; see ``own_tokens``.

    Attributes:
        layers: 0-based MoE layers of this rank, in the order of the sums.
        tokens: which tokens its routers see.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        groups: Groups,
        on_routed: OnRouted | None = None,
        *,
        packed: bool = False,
    ) -> None:
        self._config = chunks[0].config
        self._device = next(chunks[0].parameters()).device
        self._sequence_group = groups.tp_cp if self._config.sequence_parallel else groups.cp
        self.tokens = OwnTokens(
            groups, sequence_parallel=self._config.sequence_parallel, packed=packed
        )
        self._packed = packed
        self._on_routed = on_routed
        self._active = False
        self._clocks: list[ChunkClock] = []
        self.layers: list[int] = []
        for chunk in chunks:
            clock = ChunkClock(chunk)
            self._clocks.append(clock)
            for layer, router in routers(chunk):
                watch = functools.partial(self._routing, clock, len(self.layers), router)
                wrap_method(router, WATCHED_ROUTING, watch)
                self.layers.append(layer)

    def begin(
        self, micro_batches: int, samples: int, loss_mask: torch.Tensor | None = None
    ) -> None:
        """Watch a step of that many micro-batches of so many samples.

        Args:
            loss_mask: see ``Step.loss_mask``.
        """
        self._mask = None
        if loss_mask is not None:
            mask = to_device(self.tokens.of_rank(loss_mask), self._device)
            self._mask = self.tokens.of(mask)
        shape = (len(SUMS), micro_batches, samples, len(self.layers), self._config.num_moe_experts)
        self._step = torch.zeros(shape, dtype=torch.float32, device=self._device)
        for clock in self._clocks:
            clock.reset()
        self._active = True

    def end(self) -> torch.Tensor:
        """The step's sums of ``SUMS`` by sample, fp32 ``[4, n b, L, E]``.

        Collectives: one all-reduce of 4 n b L E float32 over the ranks that share sequences (TP x
        CP under sequence parallelism, else CP).
        """
        self._active = False
        if self._sequence_group.size() > 1:
            dist.all_reduce(self._step, group=self._sequence_group)
        return self._step.flatten(1, 2)

    def _routing(
        self,
        clock: ChunkClock,
        layer: int,
        router: MegatronModule,
        call: Call,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``TopKRouter.routing``: logits ``[l, b, E]`` to gates and choices ``[l b, E]``."""
        gates, chosen = call()
        if self._active and clock.inside:
            with torch.no_grad():
                logits, padding = call["logits"], call["padding_mask"]
                self._record(clock.micro_batch, layer, router, logits, gates, chosen, padding)
        return gates, chosen

    def _record(
        self,
        micro_batch: int,
        layer: int,
        router: MegatronModule,
        logits: torch.Tensor,
        gates: torch.Tensor,
        chosen: torch.Tensor,
        padding: torch.Tensor | None,
    ) -> None:
        length, samples, experts = logits.shape
        drops = self._config.moe_expert_capacity_factor is not None
        before = chosen_before_dropping(router, logits.detach()) if drops else chosen
        probs = router_distribution(logits.detach(), self._config.moe_router_score_function)
        values = [before.float(), gates.detach().float(), probs.view(-1, experts)]
        if drops:
            values.append((before & ~chosen).float())
        rows = torch.stack(values).view(-1, length, samples, experts)
        if padding is not None:
            padding = padding.view(length, samples)
        if self._mask is not None:
            left_out = ~self.tokens.seen(self._mask[micro_batch], (length, samples))
            padding = left_out if padding is None else padding | left_out
        if padding is not None:
            rows = rows * ~padding.unsqueeze(-1)
        sums = self._step[: len(rows), micro_batch, :, layer]
        if self._packed and sums.shape[1] > 1:
            sums.copy_(self._by_sample(rows, sums.shape[1]))
        else:
            sums.copy_(rows.sum(1))
        if self._on_routed is not None:
            before = before.view(length, samples, experts)
            logits = logits.detach()
            if self._packed:
                logits, before = (self.tokens.as_row(x) for x in (logits, before))
                padding = None if padding is None else self.tokens.as_row(padding)
            self._on_routed(micro_batch, layer, logits, before, padding)

    def _by_sample(self, rows: torch.Tensor, samples: int) -> torch.Tensor:
        """Sums ``[4, b, E]`` of what a router saw of a row, ``[4, l, b', E]``."""
        sample = self.tokens.samples_of_row(samples, rows.shape[1] * rows.shape[2])
        sample = to_device(sample, rows.device)
        sums = rows.new_zeros(len(rows), samples, rows.shape[-1])
        row = rows.transpose(1, 2).flatten(1, 2)
        return sums.index_add_(1, sample, row)


def chosen_before_dropping(router: MegatronModule, logits: torch.Tensor) -> torch.Tensor:
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


def router_distribution(logits: Tensor, score_function: str) -> Tensor:
    """Scores of a router as a distribution over all experts, as Megatron's balance losses take it.

    Args:
        logits: ``[..., E]`` in any floating type.
        score_function: ``moe_router_score_function``, one of ``SCORE_FUNCTIONS``.

    Returns:
        fp32 ``[..., E]``, 1 per token in sum. Source: ``compute_routing_scores_for_aux_loss`` in
        ``megatron/core/transformer/moe/moe_utils.py``.
    """
    logits = logits.float()
    if score_function == "softmax":
        return logits.softmax(-1)
    scores = logits.sigmoid() if score_function == "sigmoid" else F.softplus(logits).sqrt()
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)
