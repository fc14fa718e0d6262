"""Divergence from a teacher of which only k ids per token are known, such as one stored on disk.

Shapes: t tokens (rows), k ids per token, v vocabulary, p tensor-parallel size.

The k stored ids S and one *rest* outcome, all other real ids together, make a row of k + 1
outcomes. Once every rank knows the student's log-probabilities of those, the divergence and its
gradient by them are the row maths of ``rows.py`` on [t, k + 1] numbers, the same on every rank. The
gradient G_o of an outcome o then reaches the columns through the student's probability of a column
within its outcome: 1 for an id of S, Q_c / Q_rest for the others.

So two passes over the student's columns remain, as in ``rows.py``: one for the log of the sum of
exponentials of the rest, with S masked out (1 - Q_S would cancel where Q_S is nearly 1), and one
for the gradient. Between them travel k logits and 2 numbers per token and rank.

What stands for the teacher's part of the rest is the ``tail`` treatment:

    renormalize  nothing: P is scaled to 1 over S. Forward KL only; the student learns that the rest
                 is impossible, the known bias of top-k distillation.
    bucket       what S leaves of 1, clamped at 0. A true divergence of the coarser outcomes, for
                 all kinds, which leaves the shape of the student's rest alone.
    sample       ids drawn at random with importance weights w_i instead of probabilities: the loss
                 is sum_i w_i (-log Q_i), whose gradient is in expectation that of the forward KL to
                 the whole teacher (Anshumann et al., Sparse Logit Sampling, 2503.16870). Unbiased,
                 at the price of noise. The value exceeds the KL by the teacher's entropy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_moe_inject.losses.checks import check_tail
from megatron_moe_inject.losses.rows import (
    LogitRows,
    RowStats,
    exchange,
    local_maximum,
    logit_gradient,
    maths_dtype,
    mixture_terms,
    shifted,
)
from megatron_moe_inject.losses.spec import Divergence, VocabShard
from megatron_moe_inject.losses.target import PerToken, Sparse

# The least probability of a bucket in reverse KL: the rounding unit of float32.
_LEAST_REST = 2.0**-24


@dataclass(frozen=True)
class SparseRows(PerToken):
    """What a ``Sparse`` target says about rows, ready for a student's vocabulary.

    ``ids`` [t, k] are global. ``log_p`` [t, k + 1] has the log-probability (for "sample" the log
    weight) of each id and of the rest, -inf where a slot is unused. ``empty`` [t] marks rows
    without any used slot, ``invalid`` [t] those that break the rules of ``of``. ``label`` [t] is
    the log-probability of the label at temperature 1, None where that is not known.
    """

    ids: Tensor
    log_p: Tensor
    empty: Tensor
    invalid: Tensor
    tail: str
    label: Tensor | None = None

    @classmethod
    def of(
        cls,
        target: Sparse,
        *,
        kind: str,
        vocab_size: int,
        dtype: torch.dtype,
    ) -> Self:
        """From a target of t tokens; ``dtype`` is that of the maths.

        A row is invalid where a used id is ``vocab_size`` or more, or repeats unless ``tail`` is
        "sample". Nothing here waits for the device. No collectives.
        """
        ids, log_probs, tail = target.ids, target.log_probs.detach(), target.tail
        used = (ids >= 0) & (log_probs != -torch.inf)
        log_p = torch.where(used, log_probs.to(dtype), -torch.inf)
        empty = ~used.any(-1)
        invalid = (used & (ids >= vocab_size)).any(-1)
        log_rest = log_p.new_full(empty.shape, -torch.inf)
        if tail != "sample":
            slot = torch.arange(ids.shape[-1], device=ids.device)
            key = torch.where(used, ids, -1 - slot).sort(-1).values
            invalid |= (key[:, 1:] == key[:, :-1]).any(-1)
            log_mass = _log_sum_near_one(log_p).masked_fill(empty, 0)
            if tail == "bucket":
                least = math.log(_LEAST_REST) if kind == "reverse_kl" else -math.inf
                log_left = _log_one_minus_exp(log_mass)
                resolved = log_left > least
                # Without an id outside S, what is left of 1 is rounding.
                exists = used.sum(-1) < vocab_size
                log_rest = log_left.clamp(min=least).where(exists, -math.inf)
                log_mass = log_mass - log_rest.exp().neg_().log1p_()
                log_mass.masked_fill_(exists & resolved, 0)
            log_p = log_p - log_mass[:, None]
        label = target.label_log_probs
        if label is not None:
            label = label.detach().to(dtype).squeeze(-1)
        return cls(ids, torch.cat((log_p, log_rest[:, None]), -1), empty, invalid, tail, label)

    def parts(self) -> tuple[tuple[Tensor, ...], Callable[..., "SparseRows"]]:
        """All but the tail; see ``PerToken``."""
        tail = self.tail

        def made_of(
            ids: Tensor, log_p: Tensor, empty: Tensor, invalid: Tensor, *label: Tensor
        ) -> SparseRows:
            return SparseRows(ids, log_p, empty, invalid, tail, *label)

        label = () if self.label is None else (self.label,)
        return (self.ids, self.log_p, self.empty, self.invalid, *label), made_of

    def rows(self, rows: slice) -> Self:
        """Some of the rows."""
        return self.changed(lambda tensor: tensor[rows])

    def locate(self, shard: VocabShard) -> Tensor:
        """Column of each id in this shard; one behind the last where it is not here. [t, k]"""
        column, in_shard = shard.locate(self.ids)
        return torch.where(in_shard & (self.log_p[:, :-1] != -torch.inf), column, shard.columns)


class SparseStats(NamedTuple):
    """What ``sparse_gradient`` needs besides the logits, the same on every rank.

    ``divergence`` [t] is D without T^2. ``rest_max`` and ``rest_lse`` [t] are the largest logit of
    the columns that share one gradient (for "sample" all, otherwise those outside S) and the log of
    the sum of exponentials relative to it at the temperature. ``outcome_gradient`` [t, k + 1] is
    the derivative of T^2 D by the logits of S and by a shift of those columns.
    """

    divergence: Tensor
    rest_max: Tensor
    rest_lse: Tensor
    outcome_gradient: Tensor


def vocab_parallel_sparse_divergence(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    *,
    kind: str = "forward_kl",
    tail: str = "renormalize",
    temperature: float = 1.0,
    tp_group: ProcessGroup | None = None,
    valid_vocab_size: int | None = None,
    beta: float = 0.5,
    skew: float = 0.1,
) -> Tensor:
    """T^2 times the divergence of every token from k stored teacher ids.

    Differentiable by the student's logits.

    Args:
        student_logits: [..., v/p], any floating dtype; left unmodified.
        teacher_ids: [..., k] int64 global ids, the same on every rank of ``tp_group``; a negative
            id is an unused slot. The used ids of a token differ, except for tail "sample".
        teacher_log_probs: [..., k], the teacher's log-probabilities over its whole vocabulary *at
            the temperature*: whoever stored them divided the teacher's logits by T, nothing is
            tempered here. -inf is an unused slot. A constant, left unmodified. For tail "sample"
            the log of importance weights, see ``sample_teacher``.
        kind: see ``vocab_parallel_divergence``; tails "renormalize" and "sample" allow forward_kl.
        tail: what becomes of the ids that are not stored, see the module: "renormalize", "bucket"
            or "sample". Stored probabilities that sum to more than 1, as rounded ones may, are
            scaled to 1 by "bucket", too.
        temperature: T > 0 of the student, and that which the store was made with.
        tp_group: the group over whose ranks the vocabulary is sharded, equally and in rank order;
            None for logits that are not sharded.
        valid_vocab_size: global ids from here on are padding: neither in the student's softmax nor
            in its rest, and a gradient of 0. None when there is no padding.
        beta, skew: the teacher's weight in the mixture, see ``vocab_parallel_divergence``.

    Returns:
        [...] in float32 (float64 for float64 logits), the same on every rank of ``tp_group``. 0
        with a gradient of 0 for a token whose slots are all unused. A token that no store should
        have, with a used id that is padding or beyond the vocabulary or with an id twice, gives
        +inf and a gradient of NaN: finding it earlier would wait for the device. In reverse
        KL a bucket has at least the probability 2^-24, float32's rounding unit: the loss would be
        infinite wherever a confident teacher's stored probabilities round to 1.

    Raises:
        ValueError: an unknown kind or tail, a pair that does not go together, a parameter out of
            range, or shapes that do not fit.

    Collectives over ``tp_group``, n tokens: in the forward pass one all-gather of (k + 2) n float32
    numbers per rank; none in the backward pass. The student's logits never travel.
    """
    target = Sparse(teacher_ids, teacher_log_probs, tail, temperature)
    if target.tokens != student_logits.shape[:-1]:
        raise ValueError(
            f"teacher_ids {tuple(teacher_ids.shape)} must be the tokens "
            f"{tuple(student_logits.shape[:-1])} of the student's {tuple(student_logits.shape)}"
        )
    divergence = Divergence(kind, beta, skew)
    check_tail(kind, tail)
    shard = VocabShard.of(student_logits.shape[-1], tp_group, valid_vocab_size)
    rows = SparseRows.of(
        target.changed(lambda slots: slots.reshape(-1, slots.shape[-1])),
        kind=kind,
        vocab_size=shard.valid,
        dtype=maths_dtype(student_logits.dtype),
    )
    with_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    return _VocabParallelSparseDivergence.apply(
        student_logits, rows, divergence, temperature, shard, with_gradient
    )


def sample_teacher(
    log_probs: Tensor, draws: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Ids drawn from the teacher with replacement, and their log weights, for tail "sample".

    ``log_probs`` [..., v] are those of the whole vocabulary at the temperature of the loss, -inf at
    padding. Returns ids [..., draws] int64 and log weights [..., draws]: each draw counts 1/draws.
    Draws from another proposal r would weigh P_i / (draws r_i). No collectives; ValueError unless
    ``draws`` is positive.
    """
    if draws < 1:
        raise ValueError(f"draws={draws} must be at least 1")
    dtype = maths_dtype(log_probs.dtype)
    probs = log_probs.to(dtype).exp()
    ids = torch.multinomial(
        probs.reshape(-1, probs.shape[-1]), draws, replacement=True, generator=generator
    ).view(*probs.shape[:-1], draws)
    return ids, torch.full_like(ids, -math.log(draws), dtype=dtype)


def sparse_statistics(
    logits: LogitRows, target: SparseRows, divergence: Divergence, shard: VocabShard
) -> SparseStats:
    """Losses and all that ``sparse_gradient`` needs, of ``logits.x`` [t, c] (``y`` unused).

    Collectives over the shard's group: one all-gather of k + 2 numbers per row.
    """
    temperature = logits.temperature
    rest_max, rest_sum, picked = _merge(_local_statistics(logits, target, shard), logits, shard)
    rest_lse = rest_sum.log()
    # T^2 D by the logits, from D by the logits / T.
    scale = torch.ones_like(rest_max) * temperature
    if target.tail == "sample":
        log_q = shifted(picked, rest_max, temperature).sub_(rest_lse[:, None])
        weight = target.log_p[:, :-1].exp()
        loss = -(weight * log_q).masked_fill(weight == 0, 0).sum(-1)
        gradient = torch.cat((-weight, weight.sum(-1, keepdim=True)), -1).mul_(scale[:, None])
    else:
        x_max = torch.maximum(rest_max, picked.amax(-1))
        log_q_ids = shifted(picked, x_max, temperature)
        log_q_rest = (rest_max - x_max) / temperature + rest_lse
        lse = (log_q_ids.exp().sum(-1) + log_q_rest.exp()).log()
        log_q = torch.cat((log_q_ids, log_q_rest[:, None]), -1).sub_(lse[:, None])
        loss, gradient = _outcomes(log_q, target.log_p, divergence, scale)
    loss = loss.masked_fill(target.empty, 0).masked_fill(target.invalid, torch.inf)
    gradient.masked_fill_(target.empty[:, None], 0)
    gradient.masked_fill_(target.invalid[:, None], torch.nan)
    # Without a rest there is nothing to normalise: its columns, all -inf, keep probability 0.
    return SparseStats(loss, rest_max, rest_lse.masked_fill(rest_sum == 0, 0), gradient)


def sparse_gradient(
    logits: LogitRows,
    target: SparseRows,
    stats: SparseStats,
    shard: VocabShard,
    weight: Tensor,
    out: Tensor,
) -> None:
    """Write the derivative of weight T^2 D by ``logits.x`` into ``out`` [t, c].

    With a ``logits.transform`` it is that by what the transform was applied to.
    A row where ``weight`` [t] is 0 gets 0, whatever its divergence. ``out`` may be ``logits.x``
    itself. No collectives.
    """
    outcomes = stats.outcome_gradient * weight[:, None]
    outcomes.masked_fill_((weight == 0)[:, None], 0)
    for rows in logits.blocks():
        block, columns = logits.rows(rows), target.rows(rows).locate(shard)
        copy = _with_spare_column(block.x)
        rest = _rest(copy, columns, target.tail)
        shifted(rest, stats.rest_max[rows], block.temperature, out=rest)
        rest.sub_(stats.rest_lse[rows, None]).exp_().mul_(outcomes[rows, -1:])
        copy.scatter_add_(1, columns, outcomes[rows, :-1])
        if logits.transform:
            logits.transform.pull_back_(rest, block.x)
        out[rows] = rest


class _VocabParallelSparseDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        target: SparseRows,
        divergence: Divergence,
        temperature: float,
        shard: VocabShard,
        with_gradient: bool,
    ) -> Tensor:
        tokens, width = student_logits.shape[:-1], student_logits.shape[-1]
        rows = student_logits.reshape(-1, width)[:, : shard.columns]
        logits = LogitRows(rows, None, labels=None, temperature=temperature)
        stats = sparse_statistics(logits, target, divergence, shard)
        if with_gradient:
            gradient = torch.zeros_like(student_logits, memory_format=torch.contiguous_format)
            out = gradient.view(-1, width)[:, : shard.columns]
            one = torch.ones_like(stats.divergence)
            sparse_gradient(logits, target, stats, shard, one, out)
            ctx.save_for_backward(gradient)
        return (stats.divergence * temperature**2).view(tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_loss,) = grad_outputs
        (gradient,) = ctx.saved_tensors
        out = torch.empty_like(gradient)
        return torch.mul(gradient, grad_loss.unsqueeze(-1), out=out), *[None] * 5


def _local_statistics(logits: LogitRows, target: SparseRows, shard: VocabShard) -> Tensor:
    """This rank's maximum and sum of exponentials of the rest, and its logits of S: [k + 2, t]."""
    parts = []
    for rows in logits.blocks():
        block, columns = logits.rows(rows), target.rows(rows).locate(shard)
        copy = _with_spare_column(block.x)
        picked = copy.gather(1, columns)
        rest = _rest(copy, columns, target.tail)
        maximum = local_maximum(rest)
        total = shifted(rest, maximum, block.temperature, out=rest).exp_().sum(-1)
        parts.append(torch.cat((maximum[None], total[None], picked.t())))
    return torch.cat(parts, dim=1)


def _with_spare_column(x: Tensor) -> Tensor:
    """A copy [t, c + 1] with -inf behind: slots of S that are not on this rank point there."""
    copy = x.new_full((len(x), x.shape[1] + 1), -torch.inf, dtype=maths_dtype(x.dtype))
    copy[:, :-1] = x
    return copy


def _rest(copy: Tensor, columns: Tensor, tail: str) -> Tensor:
    """The columns of ``copy`` without the spare one; but for "sample", S becomes -inf in them."""
    if tail != "sample":
        copy.scatter_(1, columns, -torch.inf)
    return copy[:, :-1]


def _merge(local: Tensor, logits: LogitRows, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum [t] and sum of exponentials [t] of the whole rest, and the logits of S [t, k]."""
    ranks = exchange({"all": local}, shard)["all"]
    rest_max = ranks[:, 0].amax(0)
    below = (ranks[:, 0] - rest_max) / logits.temperature
    return rest_max, (below.exp() * ranks[:, 1]).sum(0), ranks[:, 2:].amax(0).t().contiguous()


def _outcomes(
    log_q: Tensor, log_p: Tensor, divergence: Divergence, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """D [t] of outcomes [t, k + 1], and ``scale`` [t] times its gradient by their logits."""
    zero = torch.zeros_like(scale)
    outcomes = LogitRows(log_q, log_p, labels=None, temperature=1.0)
    stats = RowStats(x_max=zero, x_lse=zero, y_max=zero, y_lse=zero)
    if divergence.kind == "forward_kl":
        loss = slope = _kl(log_p, log_q)
    elif divergence.kind == "reverse_kl":
        loss = slope = _kl(log_q, log_p)
    else:
        w = divergence.mixture
        assert w is not None, "a kind with a mixture"
        log_m = torch.logaddexp(log_p + math.log(w), log_q + math.log1p(-w))
        loss = _kl(log_p, log_m)
        if divergence.kind == "jsd":
            loss = w * loss + (1 - w) * _kl(log_q, log_m)
        _, slope = mixture_terms(outcomes, stats, divergence)
    stats = stats._replace(divergence=loss, slope=slope)
    gradient = torch.empty_like(log_q)
    slots = log_q.shape[-1]
    unsharded = VocabShard(0, slots, None, slots)
    logit_gradient(outcomes, stats, divergence, unsharded, scale, None, gradient)
    return loss, gradient


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of normalised log-probabilities, as the sum of a log(a/b) - a + b.

    No term is negative, and near a = b each is quadratic in the difference, so the rounding of the
    stored numbers does not show as it does in a log(a/b) alone.
    """
    gap = (log_a - log_b).masked_fill_(log_a == log_b, 0)
    above = gap.clamp(min=0)
    below = gap.clamp_(min=-100, max=0)
    terms = (above + (-above).expm1()).mul_(log_a.exp())
    return terms.add_((below * below.exp() - below.expm1()).mul_(log_b.exp())).sum(-1)


def _log_sum_near_one(log_p: Tensor) -> Tensor:
    """Log of the sum of exp(log_p) [t, k], accurate where one of them is almost 1; NaN for none."""
    largest, at = log_p.max(-1, keepdim=True)
    others = (log_p - largest).exp_().scatter_(-1, at, 0).sum(-1)
    return largest.squeeze(-1) + others.log1p_()


def _log_one_minus_exp(log_mass: Tensor) -> Tensor:
    """log(1 - exp(log_mass)), -inf from 1 on."""
    log_mass = log_mass.clamp(max=0)
    near_one = (-log_mass.expm1()).log()
    return torch.where(log_mass < -math.log(2), (-log_mass.exp()).log1p(), near_one)
