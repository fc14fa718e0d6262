"""Several teachers as one: the mixture of their distributions, formed chunk by chunk.

Shapes: t tokens (of a chunk, where it is mixed), h_k hidden size of teacher k, v vocabulary, p
tensor-parallel size, c columns of this rank that hold real ids.

    P = sum_k w_k softmax(z_k / T),   sum_k w_k = 1

Probabilities are mixed, not logits: the mean of logits is a product of experts, which gives an id
next to nothing as soon as one teacher does. One teacher's logits exist at a time. They become
log-probabilities with a log-sum-exp over the whole vocabulary and go into the sum by logaddexp, so
a chunk needs one float32 block beside the logits, however many teachers there are.

Weights may differ by token: w_k c_k / sum_j w_j c_j, with c_k teacher k's confidence there, at
temperature 1. The running sum is kept normalised, so that small confidences lose no precision.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe_inject.losses.rows import (
    LogitRows,
    exchange,
    is_one,
    known,
    label_logit,
    local_maximum,
    maths_dtype,
    shifted,
)
from megatron_moe_inject.losses.spec import TokenWeighting, VocabShard
from megatron_moe_inject.losses.target import Mixed, TeacherLogits

# Least log-confidence: where no teacher gives the label any probability, the fixed weights remain.
_LEAST_CONFIDENCE = -1e3


class _Rows(NamedTuple):
    """A teacher's statistics over the whole vocabulary, each [t]; ``unit_lse`` is at T = 1."""

    maximum: Tensor
    lse: Tensor
    unit_lse: Tensor
    label: Tensor


def mix(
    committee: Mixed,
    labels: Tensor,
    temperature: float | Tensor,
    shard: VocabShard,
    weighting: TokenWeighting | None = None,
) -> TeacherLogits:
    """The teachers' mixture on this rank's columns, in the dtype of the maths.

    Args:
        committee: the teachers of these tokens.
        labels: [t] global ids, negative where there is none.
        temperature: T, a number or [t].
        shard: this rank's part of the vocabulary.
        weighting: what the mixture's cross-entropy and entropy are wanted for.

    Collectives over the shard's group: one all-gather of at most 4 t numbers per teacher, and one
    all-reduce of t numbers where the entropy is wanted.
    """
    entropy = weighting is not None and weighting.confidence == "entropy"
    at_one = entropy and not is_one(temperature)
    mixed: Tensor | None = None
    unit: Tensor | None = None
    total: Tensor | None = None
    label: Tensor | None = None
    for member, weight in zip(committee.members, committee.weights, strict=True):
        rows = LogitRows(member.logits(shard.columns), None, labels, temperature)
        stats = _statistics(rows, shard, with_unit=bool(weighting) or committee.by != "fixed")
        own = _log_confidence(committee.by, stats, labels) + math.log(weight)
        before, total = total, own if total is None else torch.logaddexp(total, own)
        kept, own = None if before is None else before - total, own - total
        mixed = _added(mixed, kept, rows, stats.maximum, own - stats.lse)
        if at_one:
            rows = replace(rows, temperature=1.0)
            unit = _added(unit, kept, rows, stats.maximum, own - stats.unit_lse)
        own = own + stats.label
        label = own if label is None or kept is None else torch.logaddexp(label + kept, own)
        del rows
    mixed = known(mixed)  # a committee has a member
    found = None
    if entropy:
        found = _entropy(mixed if unit is None else unit, shard)
    if not is_one(temperature):
        mixed.mul_(temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    return TeacherLogits(mixed, known(label).neg() if weighting else None, found)


def _statistics(rows: LogitRows, shard: VocabShard, with_unit: bool) -> _Rows:
    parts = []
    for block in rows.blocks():
        own = rows.rows(block)
        local = {"maximum": local_maximum(own.x)}
        local["sum"] = shifted(own.x, local["maximum"], own.temperature).exp_().sum(-1)
        if with_unit and not is_one(own.temperature):
            local["unit_sum"] = shifted(own.x, local["maximum"], 1.0).exp_().sum(-1)
        if with_unit:
            local["label"] = label_logit(own.x, known(own.labels), shard)
        parts.append(local)
    ranks = exchange({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, shard)
    maximum = ranks["maximum"].amax(0)
    below = ranks["maximum"] - maximum
    lse = unit_lse = ((below / rows.temperature).exp() * ranks["sum"]).sum(0).log()
    if "unit_sum" in ranks:
        unit_lse = (below.exp() * ranks["unit_sum"]).sum(0).log()
    label = torch.zeros_like(lse)
    if with_unit:
        label = ranks["label"].amax(0) - maximum - unit_lse
    return _Rows(maximum, lse, unit_lse, label)


def _log_confidence(by: str, stats: _Rows, labels: Tensor) -> Tensor:
    if by == "label":
        return torch.where(labels >= 0, stats.label.clamp(min=_LEAST_CONFIDENCE), 0.0)
    if by == "top":
        return stats.unit_lse.neg()
    return torch.zeros_like(stats.lse)


def _added(
    mixed: Tensor | None, kept: Tensor | None, rows: LogitRows, maximum: Tensor, offset: Tensor
) -> Tensor:
    """log(exp(mixed + kept) + exp((z - maximum) / T + offset)), [t, c], in ``mixed`` if given."""
    if mixed is None:
        mixed = torch.empty_like(rows.x, dtype=maths_dtype(rows.x.dtype))
    for block in rows.blocks():
        own = rows.rows(block)
        term = shifted(own.x, maximum[block], own.temperature).add_(offset[block, None])
        if kept is None:
            mixed[block] = term
        else:
            so_far = mixed[block].add_(kept[block, None])
            torch.logaddexp(so_far, term, out=so_far)
    return mixed


def _entropy(log_probs: Tensor, shard: VocabShard) -> Tensor:
    blocks = LogitRows(log_probs, None, None, 1.0).blocks()
    found = torch.cat([torch.special.entr(log_probs[rows].exp()).sum(-1) for rows in blocks])
    if shard.group is not None:
        dist.all_reduce(found, group=shard.group)
    return found
