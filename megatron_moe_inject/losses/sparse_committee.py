"""A committee of which some members know only some ids of each token, as one such teacher.

Shapes: t tokens (of a chunk, where logits are made), k_i ids of member i, K their sum, c columns of
this rank that hold real ids, p tensor-parallel size.

    P = sum_i w_i P_i,   sum_i w_i = 1

What comes out is a ``Sparse`` target: the ids U that any stored member knows, each with what the
members that know it give it, m_u = sum over these of w_i P_i(u). Members by hidden states know all
ids. The rest of 1 is the bucket's, so a member's unknown mass r_i goes there with its weight.

What is exact, and what is a bound:

- One stored member beside any number of models, or several that know the same ids: m = P on U. The
  divergence is that of P with all other ids as one outcome: a true divergence of P, at most the
  whole one, as with one store alone.
- Several stores that know different ids: a member that lacks u knows of it only that P_i(u) is at
  most r_i, and of the most likely ids at most its least known one's probability p_i. So
  P(u) - m_u lies between 0 and sum over these of w_i min(r_i, p_i), and the total variation d of m
  and P, both as outcomes U and the rest, is at most sum_i w_i r_i. The gradient of the forward KL
  by the student's logits is that of P with an error of at most 2 d T in the sum of its absolutes.
- ``renormalize``: m scaled to 1 on U.
- ``sample``: draws of all members with their weights times w_i. Unbiased for the forward KL to P,
  since the loss is linear in them.

Where all members know all ids, the loss is that of ``committee.mix``. Nothing of it is computed
again in a backward pass: the ids are few.
"""

import math
import operator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe_inject.losses.committee import (
    LEAST_CONFIDENCE,
    log_confidence,
    member_statistics,
)
from megatron_moe_inject.losses.rows import LogitRows, known, maths_dtype, shifted
from megatron_moe_inject.losses.spec import VocabShard
from megatron_moe_inject.losses.target import Dense, Mixed, Sparse


class _Known(NamedTuple):
    """What a member says of the ids [t, K] and the label [t], logs; ``unit`` is at temperature 1.

    ``confidence`` [t] multiplies its weight.
    """

    log_probs: Tensor
    unit: Tensor | None
    label: Tensor | None
    confidence: Tensor


@torch.no_grad()
def as_sparse(
    committee: Mixed, labels: Tensor, temperature: float, shard: VocabShard, chunk_tokens: int
) -> Sparse:
    """A committee with a ``Sparse`` member as one.

    Args:
        committee: of t tokens.
        labels: [t] global ids, negative where there is none.
        temperature: T of the loss, at which its stored members were stored.
        shard: of the heads of its other members.
        chunk_tokens: whose logits exist at once.

    Returns:
        At T. ``unit_log_probs`` and ``label_log_probs`` are there where all members know them.

    Collectives over the shard's group, for each member by hidden states and chunk of n tokens: one
    all-gather of at most 4 n numbers per rank and one all-reduce (max) of K n.
    """
    if committee.sparse[0].tail == "sample":
        return _drawn(committee, labels)
    ids = _union(committee.sparse)
    total = sum(committee.weights)
    has_label = all(member.label_log_probs is not None for member in committee.sparse)
    has_unit = all(member.unit is not None for member in committee.sparse)
    members = [
        _stored(member, ids, labels, committee.by)
        if isinstance(member, Sparse)
        else _computed(member, ids, labels, temperature, shard, committee.by, chunk_tokens)
        for member in committee.members
    ]
    shares = _shares(members, [weight / total for weight in committee.weights])

    def mixed(parts: list[Tensor | None]) -> Tensor:
        terms = [share.view(-1, 1) + known(part) for share, part in zip(shares, parts, strict=True)]
        return torch.logsumexp(torch.stack(terms), 0)

    unit = label = None
    if has_unit and temperature != 1:
        unit = mixed([member.unit for member in members])
    if has_label:
        label = mixed([known(member.label)[:, None] for member in members])
    log_probs = mixed([member.log_probs for member in members])
    tail = committee.sparse[0].tail
    return Sparse(ids, log_probs, tail, temperature, unit, label)


def _shares(members: list[_Known], weights: list[float]) -> list[Tensor]:
    """Logs of the members' weights, [t] each, which sum to 1."""
    logs = [
        member.confidence + math.log(weight)
        for member, weight in zip(members, weights, strict=True)
    ]
    return list(torch.stack(logs) - torch.logsumexp(torch.stack(logs), 0))


def _drawn(committee: Mixed, labels: Tensor) -> Sparse:
    """Of members whose ids were drawn."""
    members, total = committee.sparse, sum(committee.weights)
    parts = [
        _Known(
            member.log_probs,
            None,
            None if member.label_log_probs is None else member.label_log_probs[:, 0],
            _confidence(member, labels, committee.by),
        )
        for member in members
    ]
    shares = _shares(parts, [weight / total for weight in committee.weights])
    weights = [share[:, None] + part.log_probs for share, part in zip(shares, parts, strict=True)]
    label = None
    if all(part.label is not None for part in parts):
        terms = [share + known(part.label) for share, part in zip(shares, parts, strict=True)]
        label = torch.logsumexp(torch.stack(terms), 0)[:, None]
    ids = torch.cat([member.ids for member in members], -1)
    return Sparse(
        ids, torch.cat(weights, -1), "sample", members[0].temperature, label_log_probs=label
    )


def _used(member: Sparse) -> Tensor:
    return (member.ids >= 0) & (member.log_probs != -torch.inf)


def _union(members: tuple[Sparse, ...]) -> Tensor:
    """The ids [t, K] that any member knows, ascending, -1 behind them."""
    none = torch.iinfo(torch.int64).max
    ids = torch.cat([m.ids.masked_fill(~_used(m), none) for m in members], -1).sort(-1).values
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    ids = ids.masked_fill(again, none).sort(-1).values
    return ids.masked_fill(ids == none, -1)


def _stored(member: Sparse, ids: Tensor, labels: Tensor, by: str) -> _Known:
    used = _used(member)
    ascending = ids.masked_fill(ids < 0, torch.iinfo(torch.int64).max)
    slots = torch.searchsorted(ascending, member.ids.clamp(min=0))
    # Unused ids go to a column behind.
    slots = slots.masked_fill(~used, ids.shape[-1])

    def placed(log_probs: Tensor) -> Tensor:
        whole = log_probs.new_full((len(ids), ids.shape[-1] + 1), -torch.inf)
        return whole.scatter_(1, slots, log_probs.masked_fill(~used, -torch.inf))[:, :-1]

    # An id that a row has twice belongs to no store: it must not pass for one.
    times = torch.zeros_like(slots).new_zeros(len(ids), ids.shape[-1] + 1)
    twice = times.scatter_add_(1, slots, torch.ones_like(slots))[:, :-1] > 1
    dtype = maths_dtype(member.log_probs.dtype)
    log_probs = placed(member.log_probs.to(dtype)).masked_fill(twice, torch.nan)
    unit = None if member.unit is None else placed(member.unit.log_probs.to(dtype))
    label = None if member.label_log_probs is None else member.label_log_probs[:, 0].to(dtype)
    return _Known(log_probs, unit, label, _confidence(member, labels, by))


def _confidence(member: Sparse, labels: Tensor, by: str) -> Tensor:
    """Log of what multiplies a stored member's weight at each token, [t]."""
    if by == "label":
        label = known(member.label_log_probs)[:, 0].clamp(min=LEAST_CONFIDENCE)
        return torch.where(labels >= 0, label, 0.0)
    if by == "top":
        assert member.unit is not None, "a committee asks its members"
        used = member.unit.log_probs.masked_fill(member.ids < 0, -torch.inf)
        return used.amax(-1).clamp(min=LEAST_CONFIDENCE)
    return member.log_probs.new_zeros(len(member.ids))


def _computed(
    member: Dense,
    ids: Tensor,
    labels: Tensor,
    temperature: float,
    shard: VocabShard,
    by: str,
    chunk_tokens: int,
) -> _Known:
    """Of a member by hidden states, chunk by chunk."""
    parts = []
    for begin in range(0, max(len(ids), 1), chunk_tokens):
        rows = slice(begin, begin + chunk_tokens)
        part = member.changed(operator.itemgetter(rows))
        parts.append(_chunk(part, ids[rows], labels[rows], temperature, shard, by))
    return _Known(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _chunk(
    member: Dense, ids: Tensor, labels: Tensor, temperature: float, shard: VocabShard, by: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = member.logits(shard.columns)
    rows = LogitRows(logits, None, labels, temperature)
    stats = member_statistics(rows, shard, with_unit=True)
    dtype = stats.lse.dtype
    picked = torch.full(ids.shape, -torch.inf, dtype=dtype, device=ids.device)
    if shard.columns:
        column, here = shard.locate(ids)
        picked = torch.where(here & (ids >= 0), logits.gather(1, column).to(dtype), picked)
    if shard.group is not None:
        dist.all_reduce(picked, op=dist.ReduceOp.MAX, group=shard.group)
    unit = shifted(picked, stats.maximum, 1.0) - stats.unit_lse[:, None]
    log_probs = shifted(picked, stats.maximum, temperature) - stats.lse[:, None]
    return log_probs, unit, stats.label, log_confidence(by, stats, labels)
