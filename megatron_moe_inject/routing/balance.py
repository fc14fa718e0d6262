"""Peace between steering and load balancing: the stock balance losses see general samples only.

Megatron's balance losses pull all tokens together towards an even use of the experts, which is
what steering works against. Here the samples of steered domains leave their sums, where a general
token keeps the weight that it had among all tokens; so a micro-batch without general samples has
no balance loss. Counts for the update of ``expert_bias`` weigh a domain token by a number, 0 by
default. The z-loss keeps every token: it bounds logits and favours no expert.

The losses are Megatron's own methods, called with the general samples' rows, except the global
one, whose collective every rank must enter and whose divisor may be 0.

Of packed samples a rank's rows may be any tokens of a micro-batch: there the rows of others are set
to 0, and the loss is that of the general tokens among all of them, which is the same sum.

Shapes: l this rank's part of the sequence, b samples, g general samples, E experts. General here
means: not steered in this layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_moe_inject.host.indices import index
from megatron_moe_inject.host.megatron_types import MegatronModule
from megatron_moe_inject.host.wrap import Call, wrap_method
from megatron_moe_inject.routing.uses import (
    ATTACHED_LOSS,
    AUX_LOSS,
    BIAS_COUNTS,
    GLOBAL_LOSS,
    SEQUENCE_LOSS,
)

_LOSS = ("scores_for_aux_loss", "routing_map")


class GeneralBalance:
    """Keeps one router's balance losses and bias counts to general samples.

    Args:
        router: Megatron's ``TopKRouter``.
        bias_counts: weight of a domain token in the counts for the expert bias.

    Attributes:
        general: positions of the general samples in the micro-batch that is being routed, and how
            many samples it has; ``None`` = leave everything stock.
        rows: bool ``[l b]``, which rows are general, where samples are packed.
    """

    def __init__(self, router: MegatronModule, bias_counts: float) -> None:
        self._router = router
        self._bias_counts = bias_counts
        self.general: tuple[Sequence[int], int] | None = None
        self.rows: torch.Tensor | None = None
        wrap_method(router, AUX_LOSS, self._apply_aux_loss)
        wrap_method(router, SEQUENCE_LOSS, self._apply_seq_aux_loss)
        wrap_method(router, GLOBAL_LOSS, self._apply_global_aux_loss)
        wrap_method(router, BIAS_COUNTS, self._apply_expert_bias)
        self._share = 1.0
        if router.calculate_per_token_loss:
            wrap_method(router, ATTACHED_LOSS, self._attach)

    def _mixed(self) -> tuple[Sequence[int], int] | None:
        """The general samples where there are others too."""
        if self.general is None or len(self.general[0]) == self.general[1]:
            return None
        return self.general

    def _apply_aux_loss(self, call: Call, **sizes: int) -> torch.Tensor:
        """On the general samples alone."""
        mixed = self._mixed()
        if mixed is None:
            return call()
        indices, samples = mixed
        if not indices:
            return call["probs"]
        if self.rows is not None:
            return self._of_rows(call, samples / len(indices))
        self._share = len(indices) / samples
        try:
            return call(
                scores_for_aux_loss=_samples(call["scores_for_aux_loss"], indices, samples)
                * self._share,
                routing_map=_samples(call["routing_map"], indices, samples),
                **sizes,
            )
        finally:
            self._share = 1.0

    def _attach(self, call: Call) -> torch.Tensor:
        """With ``calculate_per_token_loss``, where Megatron logs the loss and attaches it times the
        tokens that it was given: times those of the whole micro-batch, as the loss is a share of
        theirs."""
        if self._share == 1:
            return call()
        return call(valid_token_count=call["valid_token_count"] / self._share)

    def _apply_seq_aux_loss(self, call: Call) -> torch.Tensor:
        """On the general samples alone, of which there are fewer."""
        mixed = self._mixed()
        if mixed is not None and mixed[0] and self.rows is not None:
            # A row that the router sees as one is one sequence, whatever it holds.
            return self._of_rows(call, 1.0)
        return self._apply_aux_loss(call, **({} if mixed is None else {"bsz": len(mixed[0])}))

    def _of_rows(self, call: Call, factor: float) -> torch.Tensor:
        """On general rows among all, of which Megatron takes the mean: once over scores and once
        over choices, where a sum over general rows is divided by their number and that of all."""
        scores, chosen = (self._general_rows(call[name]) for name in _LOSS)
        return call(scores_for_aux_loss=scores * factor, routing_map=chosen)

    def _general_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """``[l b, E]`` with 0 in the rows of others."""
        assert self.rows is not None
        return rows * self.rows.unsqueeze(1)

    def _apply_global_aux_loss(self, call: Call) -> torch.Tensor:
        """Stock's formula with its sums over general tokens and its divisor over all.

        Collectives: one all-reduce of E numbers over TP x DP x CP, as in stock.
        """
        router = self._router
        coeff = router.get_aux_loss_coeff("global_aux_loss")
        if self.general is None or coeff == 0:
            return call()
        from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

        indices, samples = self.general
        scores, routing_map = call["scores_for_aux_loss"], call["routing_map"]
        tokens = len(routing_map)
        if self.rows is not None:
            scores, chosen = self._general_rows(scores), self._general_rows(routing_map)
        else:
            scores = _samples(scores, indices, samples)
            chosen = _samples(routing_map, indices, samples)
        group = router.tp_dp_cp_group
        router.global_tokens_per_expert += reduce_from_tensor_model_parallel_region(
            chosen.sum(0), group
        )
        router.ga_steps += 1
        counts = router.global_tokens_per_expert
        shares = counts / counts.sum().clamp(min=1)
        experts = router.config.num_moe_experts
        loss = coeff * experts * (shares * scores.sum(0)).sum() / (tokens * group.size())
        return router.attach_and_log_load_balancing_loss(
            call["probs"],
            coeff,
            loss,
            "global_load_balancing_loss",
            group,
            needs_dp_avg=False,
            valid_token_count=tokens,
        )

    def _apply_expert_bias(self, call: Call) -> None:
        """Counts ``[l b, E]`` choices, those of domain samples by their weight."""
        router, mixed = self._router, self._mixed()
        frozen = getattr(router, "frozen_expert_bias", False)
        if mixed is None or call["padding_mask"] is not None or frozen:
            call()
            return
        routing_map = call["routing_map"]
        if router.enable_expert_bias and torch.is_grad_enabled():
            indices, samples = mixed
            with torch.no_grad():
                if self.rows is not None:
                    general = self._general_rows(routing_map).sum(0)
                else:
                    general = _samples(routing_map, indices, samples).sum(0)
                others = routing_map.sum(0) - general
                router.local_tokens_per_expert += general + self._bias_counts * others


def _samples(rows: torch.Tensor, kept: Sequence[int], samples: int) -> torch.Tensor:
    """Rows ``[l b, E]`` of some samples, ``[l g, E]``."""
    experts = rows.shape[-1]
    sample_index = index(kept, rows.device)
    return rows.view(-1, samples, experts).index_select(1, sample_index).reshape(-1, experts)
