"""Loss terms for Megatron's log line, TensorBoard and W&B.

Each is a value ``[sum, count]`` of a micro-batch. ``term_log`` sums them over micro-batches and
DP x CP; every rank must report the same terms in the same order, with no sample of a domain too.
``lm loss`` keeps its stock meaning; what the stock loss function reported under it, the optimised
loss, becomes ``total loss``, and stays Megatron's to log.

Shapes: b batch, s sequence, C classes (general data and each domain).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_moe_inject.host.attached_loss import _OWN, sum_and_count
from megatron_moe_inject.host.indices import index
from megatron_moe_inject.host.labels import (
    GENERAL,
)
from megatron_moe_inject.host.to_device import to_device
from megatron_moe_inject.losses.objective import LossTerms

LM_LOSS = "lm loss"
KD_LOSS = "kd loss"
KD_FACTOR = "kd factor"
RETENTION = "retention loss"
TOTAL_LOSS = "total loss"
SHARE = "data share"
ALIGNED = "aligned share"


class LossReport:
    """Sums the loss terms of a micro-batch by class.

    Args:
        domains: domain names, by domain index.
        distilled: indices of the domains that have a teacher.
        by_class: also report each class, not only the sums over all of them.
        weighted: also report the mean factor of the token weighting over distilled tokens.
        retained: also report the divergence from the original model on general samples.
        shares: also report each class's share of the tokens, with ``by_class``.
        aligned: indices of the domains whose teachers have another tokenizer: also report the share
            of their tokens that belong to a chunk.
    """

    def __init__(
        self,
        domains: Sequence[str],
        distilled: Sequence[int],
        by_class: bool,
        weighted: bool = False,
        retained: bool = False,
        shares: bool = False,
        aligned: Sequence[int] = (),
    ) -> None:
        self._aligned = [i + 1 for i in aligned]
        self._shares = shares
        self._retained = retained
        self._weighted = weighted
        self._classes = [GENERAL, *range(len(domains))]
        self._names = ["general", *domains]
        self._distilled = [i + 1 for i in distilled]
        self._by_class = by_class

    def values(
        self, terms: LossTerms, loss_mask: torch.Tensor, labels: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Report values of one micro-batch, each ``[2]`` fp32 on the loss's device.

        Args:
            terms: per-token losses ``[b, s]``.
            loss_mask: ``[b, s]``.
            labels: domain index or ``GENERAL`` of the b samples.

        No collective and no device synchronisation.
        """
        mask = loss_mask.float()
        summed = [(term * mask).sum(1) for term in (terms.ce, terms.kd, terms.kd_factor)]
        readable = mask if terms.readable is None else mask * terms.readable
        rows = torch.stack([*summed, mask.sum(1), readable.sum(1)])
        member = torch.tensor([[float(x == c) for c in self._classes] for x in labels])
        ce, kd, factor, count, readable = rows @ to_device(member, rows.device)
        report = {LM_LOSS: sum_and_count(ce.sum(), count.sum())}
        if self._distilled:
            taught = index(self._distilled, kd.device)
            taught_count = readable.index_select(0, taught).sum()
            report[KD_LOSS] = sum_and_count(kd.index_select(0, taught).sum(), taught_count)
            if self._weighted:
                factor_sum = factor.index_select(0, taught).sum()
                report[KD_FACTOR] = sum_and_count(factor_sum, taught_count)
        if self._aligned:
            of_chunks = index(self._aligned, kd.device)
            parts = (x.index_select(0, of_chunks).sum() for x in (readable, count))
            report[ALIGNED] = sum_and_count(*parts)
        if self._retained:
            report[RETENTION] = sum_and_count(kd[0], count[0])
        if self._by_class:
            for i, name in enumerate(self._names):
                report[f"{LM_LOSS}/{name}"] = sum_and_count(ce[i], count[i])
                if self._shares:
                    report[f"{SHARE}/{name}"] = sum_and_count(count[i], count.sum())
                if i in self._distilled:
                    report[f"{KD_LOSS}/{name}"] = sum_and_count(kd[i], readable[i])
                    if i in self._aligned:
                        report[f"{ALIGNED}/{name}"] = sum_and_count(readable[i], count[i])
                    if self._weighted:
                        report[f"{KD_FACTOR}/{name}"] = sum_and_count(factor[i], readable[i])
        return report


def merge(stock: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The report of a micro-batch: stock's optimised loss as ``total loss``, and our terms."""
    merged: dict[str, Any] = dict(stock)
    merged[TOTAL_LOSS] = merged.pop(LM_LOSS)
    return {**merged, _OWN: ours}
