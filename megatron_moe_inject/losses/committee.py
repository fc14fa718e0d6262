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
LEAST_CONFIDENCE = -1e3


class MemberRows(NamedTuple):
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
        committee: the teachers of these tokens, all by hidden states.
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
    for member, weight in zip(committee.dense, committee.weights, strict=True):
        rows = LogitRows(member.logits(shard.columns), None, labels, temperature)
        stats = member_statistics(rows, shard, with_unit=bool(weighting) or committee.by != "fixed")
        log_share = log_confidence(committee.by, stats, labels) + math.log(weight)
        before, total = total, log_share if total is None else torch.logaddexp(total, log_share)
        log_scale, log_share = None if before is None else before - total, log_share - total
        mixed = _added(mixed, log_scale, rows, stats.maximum, log_share - stats.lse)
        if at_one:
            rows = replace(rows, temperature=1.0)
            unit = _added(unit, log_scale, rows, stats.maximum, log_share - stats.unit_lse)
        log_share = log_share + stats.label
        label = (
            log_share
            if label is None or log_scale is None
            else torch.logaddexp(label + log_scale, log_share)
        )
        del rows
    mixed = known(mixed)  # a committee has a member
    entropies = None
    if entropy:
        entropies = _entropy(mixed if unit is None else unit, shard)
    if not is_one(temperature):
        mixed.mul_(temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    return TeacherLogits(mixed, known(label).neg() if weighting else None, entropies)


def member_statistics(rows: LogitRows, shard: VocabShard, with_unit: bool) -> MemberRows:
    """Of a member's logits over the whole vocabulary.

    Args:
        rows: its logits, with labels.
        with_unit: also those at temperature 1, and of the label.

    Collectives over the shard's group: one all-gather of at most 4 t numbers per rank.
    """
    parts = []
    for block in rows.blocks():
        block_rows = rows.rows(block)
        local = {"maximum": local_maximum(block_rows.x)}
        local["sum"] = (
            shifted(block_rows.x, local["maximum"], block_rows.temperature).exp_().sum(-1)
        )
        if with_unit and not is_one(block_rows.temperature):
            local["unit_sum"] = shifted(block_rows.x, local["maximum"], 1.0).exp_().sum(-1)
        if with_unit:
            local["label"] = label_logit(block_rows.x, known(block_rows.labels), shard)
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
    return MemberRows(maximum, lse, unit_lse, label)


def log_confidence(by: str, stats: MemberRows, labels: Tensor) -> Tensor:
    """Log of what multiplies a member's weight at each token, [t]; see ``Mixed.by``."""
    if by == "label":
        return torch.where(labels >= 0, stats.label.clamp(min=LEAST_CONFIDENCE), 0.0)
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
        block_rows = rows.rows(block)
        term = shifted(block_rows.x, maximum[block], block_rows.temperature).add_(
            offset[block, None]
        )
        if kept is None:
            mixed[block] = term
        else:
            so_far = mixed[block].add_(kept[block, None])
            torch.logaddexp(so_far, term, out=so_far)
    return mixed


def _entropy(log_probs: Tensor, shard: VocabShard) -> Tensor:
    blocks = LogitRows(log_probs, None, None, 1.0).blocks()
    entropies = torch.cat([torch.special.entr(log_probs[rows].exp()).sum(-1) for rows in blocks])
    if shard.group is not None:
        dist.all_reduce(entropies, group=shard.group)
    return entropies
