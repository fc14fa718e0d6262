"""Steering at work in the student's routers, on any pipeline stage.

Each router's ``routing`` is wrapped. From the logits it computes the losses of the micro-batch that
is being routed and attaches them to the gates, so that their gradient joins the one that comes
back through the experts. No collective runs inside the pipeline, except, where a domain's tokens
are balanced within their targets, one of a few numbers per layer, as Megatron's own balance loss
has it.

Each loss is a mean over the tokens it concerns in the whole step that the data's loss mask counts:
of all micro-batches and data-parallel ranks, weighted. The sums that it divides by are known from
labels and mask before the schedule starts. Under activation recompute a router runs twice; losses
are attached where there is a graph and counted the first time.

Shapes: n micro-batches, b samples, l this rank's part of the sequence, s the whole, E experts, D
domains, L steered layers of this rank. Of packed samples a router may see ``[l, b]`` otherwise, see
``host.own_tokens``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import router_gating_linear

from megatron_moe_inject.host.attached_loss import (
    add_reports,
    attach_loss,
    step_scale,
    sum_and_count,
)
from megatron_moe_inject.host.clock import ChunkClock, Passages
from megatron_moe_inject.host.labels import PREFERENCE
from megatron_moe_inject.host.megatron_types import Chunk, Groups, MegatronModule
from megatron_moe_inject.host.model_parts import (
    routers,
)
from megatron_moe_inject.host.own_tokens import OwnTokens
from megatron_moe_inject.host.routing_watch import (
    chosen_before_dropping,
    router_distribution,
)
from megatron_moe_inject.host.to_device import to_device
from megatron_moe_inject.host.wrap import Call, wrap_method
from megatron_moe_inject.routing.balance import GeneralBalance
from megatron_moe_inject.routing.losses import (
    router_divergences,
    steering_losses,
    target_balance_losses,
)
from megatron_moe_inject.routing.rows import original_weight
from megatron_moe_inject.routing.uses import STEERED_GATING, STEERED_ROUTING

_NEVER = -1e4
"""A logit without probability."""
TERMS = STEERING, WITHIN, RETENTION = "steering loss", "target balance loss", "router retention"


@dataclass(frozen=True)
class SteeringWeights:
    """Weights of a step: of steering, of balance within targets, of router retention."""

    coeff: float
    balance: float
    retention: float


class _SteeredRouter(Passages):
    """One router and what is steered there.

    Args:
        clock: that of its chunk.
        router: Megatron's.
        targets: bool ``[D + 2, E]``: targets by domain index plus one; none of general data, which
            is first, and of pairs of answers, which are last.
        balance: keeps its stock losses to general samples; ``None`` leaves them.
        new: bool ``[E]``, experts that the original router knows nothing of; ``None`` of none.

    Attributes:
        original_logits: of the pass that is under way, with retention.
        per_token: by term, what a token of this step contributes to the loss.
    """

    def __init__(
        self,
        clock: ChunkClock,
        router: MegatronModule,
        targets: torch.Tensor,
        balance: GeneralBalance | None,
        new: torch.Tensor | None,
    ) -> None:
        super().__init__(clock)
        self.router = router
        self.targets = targets
        self.has_targets = targets.any(1).cpu()
        self.on_device = targets.any(1)
        self.balance = balance
        self.new = new
        self.original_logits: torch.Tensor | None = None
        self.per_token: dict[str, torch.Tensor] = {}


class SteeringHook:
    """Computes and attaches the losses of one rank.

    Args:
        chunks: this rank's bare model chunks.
        groups: the student's ``ProcessGroupCollection``.
        targets: by layer, bool ``[D + 1, E]``, see ``_SteeredRouter``.
        weights_at: the weights after that many optimizer steps.
        target_mass: probability on the targets where steering stops.
        original: gives the original value of a parameter; ``None`` without retention.
        stock_balance: leave Megatron's balance losses and bias counts as they are.
        bias_counts: weight of a domain token in the counts for the expert bias.
        new: by layer, bool ``[E]``: new experts that the domains chose. Retention is to the
            original router without them, so that general tokens are kept off them.
        weighs: names of the domains whose tokens are weighed by their teachers' confidence, by
            index; all others weigh nothing where there are any.
        by_token: weigh some of them by ``confidences`` of ``begin``.
        packed: whether a micro-batch is one row of its samples.

    Attributes:
        device: where the student is.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        groups: Groups,
        targets: Mapping[int, torch.Tensor],
        weights_at: Callable[[int], SteeringWeights],
        *,
        target_mass: float,
        original: Callable[[torch.Tensor], torch.Tensor] | None,
        stock_balance: bool,
        bias_counts: float,
        new: Mapping[int, torch.Tensor] | None = None,
        weighs: Mapping[int, str] | None = None,
        by_token: bool = False,
        packed: bool = False,
    ) -> None:
        self._weighs = weighs or {}
        self._new = new or {}
        self._by_token = by_token
        self._config = chunks[0].config
        self.device = next(chunks[0].parameters()).device
        self._groups = groups
        self._tokens = OwnTokens(
            groups, sequence_parallel=self._config.sequence_parallel, packed=packed
        )
        self._packed = packed
        self._sequence_group = groups.tp_cp if self._config.sequence_parallel else groups.cp
        self._weights_at = weights_at
        self._target_mass = target_mass
        targets = {layer: F.pad(mask, (0, 0, 0, 1)) for layer, mask in targets.items()}
        self._classes = len(next(iter(targets.values())))
        self._steers = any(mask.any() for mask in targets.values())
        self._original = original
        self._active = False
        self._confidence: dict[str, torch.Tensor] = {}
        self._clocks: list[ChunkClock] = []
        self._routers: list[_SteeredRouter] = []
        for chunk in chunks:
            clock = ChunkClock(chunk)
            self._clocks.append(clock)
            for layer, router in routers(chunk):
                if layer in targets:
                    self._watch(clock, router, layer, targets[layer], stock_balance, bias_counts)

    def _watch(
        self,
        clock: ChunkClock,
        router: MegatronModule,
        layer: int,
        targets: torch.Tensor,
        stock_balance: bool,
        bias_counts: float,
    ) -> None:
        new, apart = self._new.get(layer), not stock_balance and targets.any()
        steered = _SteeredRouter(
            clock,
            router,
            targets.to(self.device),
            GeneralBalance(router, bias_counts) if apart else None,
            None if new is None else new.to(self.device),
        )
        if self._original is not None:
            gating = functools.partial(self._gating, steered, self._original)
            wrap_method(router, STEERED_GATING, gating)
        wrap_method(router, STEERED_ROUTING, functools.partial(self._routing, steered))
        self._routers.append(steered)

    def _class_of(self, labels: torch.Tensor) -> torch.Tensor:
        """Places of labels in tables by class."""
        return torch.where(labels == PREFERENCE, self._classes - 1, labels + 1)

    def begin(
        self,
        labels: torch.Tensor,
        iteration: int,
        sequence_length: int,
        confidences: torch.Tensor | None = None,
        means: Mapping[int, float] | None = None,
        loss_mask: torch.Tensor | None = None,
    ) -> None:
        """Start a step.

        Args:
            labels: ``[n, b]`` domain indices, on the host.
            iteration: optimizer steps taken so far.
            sequence_length: s.
            confidences: with ``by_token``, on the last pipeline stage: fp32 ``[n, b, s/c]``, this
                context-parallel rank's part of every sequence, 0 where ``means`` has the domain.
            means: one weight for all tokens of a domain, by index.
            loss_mask: see ``Step.loss_mask``.

        Collectives: one all-reduce of 2 D + 2 numbers over the data- and context-parallel ranks;
        with ``by_token``, one broadcast of n b s/c numbers over the pipeline group.
        """
        self._labels = labels
        length = sequence_length // self._groups.cp.size()
        counted = torch.full(labels.shape, float(length))
        self._mask = mask = None
        if loss_mask is not None:
            mask = self._tokens.of_rank(loss_mask)
            counted = mask.sum(-1, dtype=torch.float32)
            mask = to_device(mask, self.device).float()
            self._mask = self._tokens.of(mask)
        index = self._class_of(labels)
        tokens = torch.bincount(index.flatten(), counted.flatten(), minlength=self._classes)
        sums = to_device(torch.stack([tokens, tokens]), self.device)
        index = to_device(index, self.device)
        self._index = self._tokens.of_samples(index, length)
        self._token_weights = None
        if self._weighs:
            whole = self._weighed(confidences, means or {}, index, length)
            whole = whole if mask is None else whole * mask
            weights = sums.new_zeros(self._classes)
            weights.index_add_(0, index.flatten(), whole.flatten(0, 1).sum(1))
            sums[1] = weights
            self._token_weights = self._tokens.of(whole)
        if self._groups.dp_cp.size() > 1:
            dist.all_reduce(sums, group=self._groups.dp_cp)
        self._confidence = {
            f"teacher confidence/{name}": sum_and_count(*sums.flip(0)[:, index + 1])
            for index, name in self._weighs.items()
        }
        self._weights = self._weights_at(iteration)
        scale = step_scale(self._config, self._groups, sums[0].sum(), self.device)
        for clock in self._clocks:
            clock.reset()
        for steered in self._routers:
            steered.reset()
            tokens, weights = (sums * steered.on_device).sum(1)
            steered.per_token = {
                STEERING: self._weights.coeff * scale / weights.clamp(min=1e-6),
                WITHIN: self._weights.balance * scale / tokens.clamp(min=1),
                RETENTION: self._weights.retention * scale / sums[0, 0].clamp(min=1),
            }
        self._sums = torch.zeros(3, 2, dtype=torch.float32, device=self.device)
        self._active = True

    def _weighed(
        self,
        confidences: torch.Tensor | None,
        means: Mapping[int, float],
        index: torch.Tensor,
        length: int,
    ) -> torch.Tensor:
        """Weights of all tokens, fp32 ``[n, b, s/c]``; see ``begin``."""
        shape = (*index.shape, length)
        if self._by_token:
            whole = self._shared(confidences, shape)
        else:
            whole = torch.zeros(shape, dtype=torch.float32, device=self.device)
        if not means:
            return whole
        by_class = [means.get(domain, 0.0) for domain in range(-1, self._classes - 1)]
        return whole + to_device(torch.tensor(by_class), self.device)[index].unsqueeze(-1)

    def _shared(self, own: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
        """The last stage's tensor on every stage."""
        group = self._groups.pp
        if own is None:
            own = torch.empty(shape, dtype=torch.float32, device=self.device)
        if group.size() > 1:
            dist.broadcast(own, src=dist.get_process_group_ranks(group)[-1], group=group)
        return own

    def end(self, reports: Any) -> None:
        """Finish the step and add what was measured to what the schedule returned.

        Args:
            reports: on the last stage, one dictionary per micro-batch of this step.

        Collectives: one all-reduce of six numbers over the ranks that share sequences and one over
        the pipeline group.
        """
        self._active = False
        for group in (self._sequence_group, self._groups.pp):
            if group.size() > 1:
                dist.all_reduce(self._sums, group=group)
        add_reports(
            reports,
            {
                name: sum_and_count(*values)
                for name, values, wanted in zip(
                    TERMS,
                    self._sums,
                    (self._steers, self._steers, self._original is not None),
                    strict=True,
                )
                if wanted
            }
            | self._confidence,
        )

    def _gating(
        self,
        steered: _SteeredRouter,
        original: Callable[[torch.Tensor], torch.Tensor],
        call: Call,
    ) -> torch.Tensor:
        """``Router.gating``: states ``[l, b, h]`` to logits ``[l, b, E]``."""
        logits = call()
        if self._active and self._weights.retention > 0:
            with torch.no_grad():
                bias = steered.router.bias
                steered.original_logits = router_gating_linear(
                    call["input"],
                    original_weight(steered.router, original),
                    None if bias is None else original(bias),
                    logits.dtype,
                )
                if steered.new is not None:
                    steered.original_logits.masked_fill_(steered.new, _NEVER)
        return logits

    def _routing(self, steered: _SteeredRouter, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """``TopKRouter.routing``: logits ``[l, b, E]`` to gates and choices ``[l b, E]``."""
        if not self._active:
            return call()
        micro_batch, first = steered.passing()
        labels = self._labels[micro_batch]
        shape = call["logits"].shape[:2]
        index = self._tokens.seen(self._index[micro_batch], shape)
        balance = steered.balance
        if balance is not None and self._weights.coeff > 0:
            general = ~steered.has_targets[self._class_of(labels)]
            balance.general = (general.nonzero().flatten().tolist(), len(labels))
            if self._packed:
                balance.rows = ~steered.on_device[index].flatten()
        try:
            gates, chosen = call()
        finally:
            if balance is not None:
                balance.general = balance.rows = None
        trains = torch.is_grad_enabled() and gates.requires_grad
        with torch.set_grad_enabled(trains):
            loss = self._losses(steered, call["logits"], chosen, index, micro_batch, first)
        if not trains:
            return gates, chosen
        return attach_loss(gates, loss, torch.ones_like(loss)), chosen

    def _losses(
        self,
        steered: _SteeredRouter,
        logits: torch.Tensor,
        chosen: torch.Tensor,
        index: torch.Tensor,
        micro_batch: int,
        first: bool,
    ) -> torch.Tensor:
        """Weighted sum of a micro-batch's losses; their plain sums are kept the first time.

        Every rank comes here with every micro-batch, also where it has no domain token.

        Args:
            index: ``[l, b]``, each token's domain index plus one.
        """
        score_function = self._config.moe_router_score_function
        probs = router_distribution(logits, score_function)
        targets = steered.targets[index]
        full = None
        if self._config.moe_expert_capacity_factor is not None:
            before = chosen_before_dropping(steered.router, logits.detach())
            full = (before & ~chosen).any(0)
        steering = steering_losses(probs, targets, target_mass=self._target_mass, full=full)
        steered_tokens, general = steered.on_device[index], index == 0
        mask = None
        if self._mask is not None:
            mask = self._tokens.seen(self._mask[micro_batch], index.shape)
            steered_tokens, general = steered_tokens * mask, general * mask
        weights = steered_tokens
        if self._token_weights is not None:
            token_weights = self._tokens.seen(self._token_weights[micro_batch], index.shape)
            weights = token_weights * steered.on_device[index]
            steering = steering * token_weights
        elif mask is not None:
            steering = steering * mask
        sums = {STEERING: (steering.sum(), weights.sum())}
        if self._weights.coeff > 0 and self._weights.balance > 0:
            on_targets = (chosen.view_as(targets) & targets).float()
            if mask is not None:
                on_targets = on_targets * mask.unsqueeze(-1)
            shares = self._shares(on_targets, index, steered.targets)
            balance = target_balance_losses(probs, targets, shares)
            balance = balance if mask is None else balance * mask
            sums[WITHIN] = balance.sum(), steered_tokens.sum()
        if steered.original_logits is not None:
            divergence = router_divergences(logits, steered.original_logits, score_function)
            steered.original_logits = None
            sums[RETENTION] = (divergence * general).sum(), general.sum()
        if first:
            for name, (value, count) in sums.items():
                row = self._sums[TERMS.index(name)]
                row[0] += value.detach()
                row[1] += count
        whole = sum(steered.per_token[name] * value for name, (value, _) in sums.items())
        return cast(torch.Tensor, whole)  # typeshed's sum may be of nothing, and so 0

    def _shares(
        self, on_targets: torch.Tensor, index: torch.Tensor, table: torch.Tensor
    ) -> torch.Tensor:
        """How the micro-batch's choices on each domain's targets, ``[l, b, E]``, split there; even
        where there are none.

        Collectives: one all-reduce of D E numbers over the ranks that share sequences.
        """
        counts = torch.zeros(table.shape, device=self.device)
        if self._packed:
            counts.index_add_(0, index.flatten(), on_targets.flatten(0, 1))
        else:
            counts.index_add_(0, index[0], on_targets.sum(0))
        if self._sequence_group.size() > 1:
            dist.all_reduce(counts, group=self._sequence_group)
        sums = counts.sum(-1, keepdim=True)
        even = table / table.sum(-1, keepdim=True).clamp(min=1)
        shares = torch.where(sums > 0, counts / sums.clamp(min=1), even)
        return shares[index]
