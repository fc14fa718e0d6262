"""Loss terms for Megatron's log line, TensorBoard and W&B.

Each is a value ``[sum, count]`` of a micro-batch. ``term_log`` sums them over micro-batches and
DP x CP; every rank must report the same terms in the same order, with no sample of a domain too.
``lm loss`` keeps its stock meaning; what the stock loss function reported under it, the optimised
loss, becomes ``total loss``, and stays Megatron's to log.

Shapes: b batch, s sequence, C classes (general data and each domain).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_moe_inject.indices import index
from megatron_moe_inject.losses.objective import LossTerms
from megatron_moe_inject.recipe import GENERAL

LM_LOSS = "lm loss"
KD_LOSS = "kd loss"
KD_FACTOR = "kd factor"
RETENTION = "retention loss"
TOTAL_LOSS = "total loss"
SHARE = "data share"

_OWN, _OF_STEP = "megatron_moe_inject", "megatron_moe_inject step"
"""Our terms in the report of a micro-batch, a dictionary beside Megatron's values; and in the first
report those of a whole step."""


class LossReport:
    """Sums the loss terms of a micro-batch by class.

    Args:
        domains: domain names, by domain index.
        distilled: indices of the domains that have a teacher.
        by_class: also report each class, not only the sums over all of them.
        weighted: also report the mean factor of the token weighting over distilled tokens.
        retained: also report the divergence from the original model on general samples.
        shares: also report each class's share of the tokens, with ``by_class``.
    """

    def __init__(
        self,
        domains: Sequence[str],
        distilled: Sequence[int],
        by_class: bool,
        weighted: bool = False,
        retained: bool = False,
        shares: bool = False,
    ) -> None:
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
        asked = mask if terms.readable is None else mask * terms.readable
        rows = torch.stack([*summed, mask.sum(1), asked.sum(1)])
        member = torch.tensor([[float(x == c) for c in self._classes] for x in labels])
        ce, kd, factor, count, asked = rows @ member.to(rows.device, non_blocking=True)
        report = {LM_LOSS: sum_and_count(ce.sum(), count.sum())}
        if self._distilled:
            taught = index(self._distilled, kd.device)
            taught_count = asked.index_select(0, taught).sum()
            report[KD_LOSS] = sum_and_count(kd.index_select(0, taught).sum(), taught_count)
            if self._weighted:
                given = factor.index_select(0, taught).sum()
                report[KD_FACTOR] = sum_and_count(given, taught_count)
        if self._retained:
            report[RETENTION] = sum_and_count(kd[0], count[0])
        if self._by_class:
            for i, name in enumerate(self._names):
                report[f"{LM_LOSS}/{name}"] = sum_and_count(ce[i], count[i])
                if self._shares:
                    report[f"{SHARE}/{name}"] = sum_and_count(count[i], count.sum())
                if i in self._distilled:
                    report[f"{KD_LOSS}/{name}"] = sum_and_count(kd[i], asked[i])
                    if self._weighted:
                        report[f"{KD_FACTOR}/{name}"] = sum_and_count(factor[i], asked[i])
        return report


def sum_and_count(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """A report value, ``[2]``, from two scalars; what is logged is a quotient of sums of them."""
    return torch.stack([total, count])


def merge(stock: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The report of a micro-batch: stock's optimised loss as ``total loss``, and our terms."""
    merged: dict[str, Any] = dict(stock)
    merged[TOTAL_LOSS] = merged.pop(LM_LOSS)
    return {**merged, _OWN: ours}


def add_reports(reports: Any, values: Mapping[str, torch.Tensor]) -> None:
    """Add terms of a whole step, ``[sum, count]`` each, to the reports of its micro-batches.

    Args:
        reports: what a schedule returned; anything but a list of dictionaries (other stages, or
            collected outputs) is left alone.
        values: counted once.
    """
    if reports and _are_reports(reports):
        reports[0].setdefault(_OF_STEP, {}).update(values)


def take_terms(reports: Any) -> tuple[list[str], torch.Tensor | None]:
    """Take our terms out of the reports of a step: K names, and their sums ``[K, 2]`` in fp32.

    Args:
        reports: as for ``add_reports``; without any there are no terms.
    """
    if not (reports and _are_reports(reports)):
        return [], None
    own = [report.pop(_OWN, {}) for report in reports]
    of_step = reports[0].pop(_OF_STEP, {})
    assert all(list(terms) == list(own[0]) for terms in own), "micro-batches report other terms"
    sums = []
    if own[0]:
        sums.append(torch.stack([v for terms in own for v in terms.values()]).float())
        sums[0] = sums[0].view(len(own), -1, 2).sum(0)
    if of_step:
        sums.append(torch.stack(list(of_step.values())).float())
    return [*own[0], *of_step], torch.cat(sums) if sums else None


def _are_reports(reports: Any) -> bool:
    return isinstance(reports, list) and all(isinstance(report, dict) for report in reports)
