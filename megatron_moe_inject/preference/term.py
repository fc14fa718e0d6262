"""The preference term inside the loss of a micro-batch: each token's cross-entropy by its weight.

The weights are known before the schedule runs (``step.py``). A pair's loss is a mean over the pairs
of the batch, which has nothing to do with how many tokens there are: what the script's loss divides
by is left out of its gradient, as it is for losses inside the model (``host.attached_loss``).

Shapes: n micro-batches, b samples each, s sequence (this context-parallel rank's part), a answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_moe_inject.host.attached_loss import attach_loss
from megatron_moe_inject.host.indices import index
from megatron_moe_inject.host.labels import PREFERENCE
from megatron_moe_inject.host.to_device import to_device
from megatron_moe_inject.losses.objective import LossTerms, SampleGroup
from megatron_moe_inject.losses.spec import TermWeights


class PreferenceTerm:
    """The term of a step, on the last pipeline stage."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """A step without pairs."""
        self._rows = torch.zeros(0, 0, 0, dtype=torch.int64)
        self._weights = torch.zeros(0)
        self._scale = torch.ones(())

    def begin(self, rows: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor) -> None:
        """Take the weights of a step.

        Args:
            rows: of each token, which of this rank's answers it is of, ``[n, b, s]`` on the device,
                -1 for none.
            weights: of each, what multiplies the cross-entropy of its tokens, ``[a]`` fp32 on the
                device.
            scale: of the sum over all ranks, see ``host.attached_loss.step_scale``.
        """
        self._rows, self._weights, self._scale = rows, weights, scale

    def weighed(
        self, groups: Sequence[SampleGroup], micro_batch: int, domains: Sequence[int]
    ) -> list[SampleGroup]:
        """The groups of a micro-batch, that of answers with a weight for each of its tokens.

        Args:
            domains: labels of its b samples.
        """
        return [
            replace(group, weights=self._token_weights(group.samples, micro_batch))
            if domains[group.samples[0]] == PREFERENCE
            else group
            for group in groups
        ]

    def _token_weights(self, samples: Sequence[int], micro_batch: int) -> TermWeights:
        own = self._rows[micro_batch].index_select(0, index(samples, self._rows.device))
        weights = self._weights.index_select(0, own.clamp(min=0).flatten()).view(own.shape)
        return TermWeights(0.0, torch.where(own >= 0, weights, 0.0).t().flatten())

    def attached(
        self, terms: LossTerms, domains: Sequence[int], loss_mask: torch.Tensor
    ) -> LossTerms:
        """The terms of a micro-batch whose loss has the answers' beside, and not in ``total``.

        Args:
            terms: tensors ``[b, s]``; those of answers have their weights.
            domains: labels of its b samples.
            loss_mask: ``[b, s]``.
        """
        if PREFERENCE not in domains:
            return terms
        total = terms.total
        answers = torch.tensor([domain == PREFERENCE for domain in domains]).unsqueeze(1)
        answers = to_device(answers, total.device)
        loss = torch.where(answers, total * loss_mask, 0.0).sum()
        total = torch.where(answers, 0.0, total)
        if loss.requires_grad:
            total = attach_loss(total, loss, self._scale)
        return replace(terms, total=total)
