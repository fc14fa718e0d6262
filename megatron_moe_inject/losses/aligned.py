"""Distillation from a teacher with another tokenizer: how likely both find the same text.

Two tokenizers cut a text at different bytes. Between two neighbouring places where both cut stands
a *chunk*: some tokens of the teacher's and some of the student's that are the same text. Each side
gives the chunk a probability, the product of those of its own tokens,

    P = prod p_T(token | all before)        Q = prod p_S(token | all before)

and approximate likelihood matching (ALM, 2503.20083) compares the two outcomes "this chunk" and
"anything else", at a temperature:

    loss of a chunk = T * D( (P^(1/T), 1 - P^(1/T)) || (Q^(1/T), 1 - Q^(1/T)) )

with D any of the divergences of this package. Where the tokenizers are the same, each token is a
chunk, and D is that of the two distributions over the vocabulary with all other ids as one outcome.

**Temperature.** P^(1/T) near 0 hardly tells 1e-6 from 1e-3, so that long chunks teach little at
T = 1; the paper takes T = 100. As T grows, T * D(forward_kl) tends to a log(a / b) + b - a with
a = -log P and b = -log Q: the factor T (not T^2, since it is a log-probability that T divides)
keeps the gradient's size whatever T is.

**Normalisation.** D is at most the sum of the divergences at the chunk's tokens (merging outcomes
only hides differences), so a chunk weighs once and not once for each token: the loss of a label is
that of its chunk divided by the number of labels in it. The mean over labels that belong to a chunk
is then comparable with the distillation loss of a teacher with the student's tokenizer.

**Precision and gradient.** All is computed from margins (``margins.py``) in float64, on [t]
numbers, so that neither P near 0 nor P or Q near 1 loses digits: with q the student's probability
of a token, the gradient of forward_kl at T = 1 by its label's margin is (Q - P) (1 - q) / (1 - Q),
bounded by |Q - P|. Full logits never exist, and with a frozen head a loss takes no other product
than a cross-entropy (``fused.label_margins``). Chunks that context-parallel ranks share are summed
over these.

Shapes: t tokens, n chunks.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_moe_inject.losses.checks import check_distilled, check_per_token
from megatron_moe_inject.losses.fused import DEFAULT, FusedLoss, FusedOptions, label_margins
from megatron_moe_inject.losses.rows import maths_dtype
from megatron_moe_inject.losses.spec import Divergence, TermWeights, TokenWeighting
from megatron_moe_inject.losses.student import Student
from megatron_moe_inject.losses.target import Aligned

# Log-probabilities are kept within these, so that no outcome is certain or impossible in float64.
_LOWEST, _HIGHEST = -1e30, -1e-300


def aligned_loss(
    student: Student, target: Aligned, weights: TermWeights, options: FusedOptions = DEFAULT
) -> FusedLoss:
    """alpha factor T D(teacher || student) + beta CE of every token; see the head of this file.

    Args:
        student: hidden states [t, h], head [v/p, h], labels [t].
        target: the teacher's chunks, of the same t labels; a constant.
        weights: of the terms; a number for the temperature. ``weighting`` is of whole chunks:
            ``label`` multiplies by P, ``skip_worse`` leaves out chunks with P < Q, at
            temperature 1.
        options: how it runs; ``upstream_mask`` is not needed.

    Returns:
        As of ``fused_loss``, ``kd`` being T D of a label's chunk divided by the chunk's labels; it
        and ``kd_factor`` are 0 where a label belongs to no chunk.

    Raises:
        ValueError: what does not fit, with the values.

    Collectives: those of ``label_margins``, and with the target's ``cp_group`` one all-reduce of n
    float64 numbers over it in the forward pass and one in the backward pass.
    """
    check_distilled(student, target, weights)
    check_per_token(student, alpha=weights.alpha, beta=weights.beta)
    assert not isinstance(weights.temperature, Tensor), "checked"
    margins = label_margins(student, options)
    dtype, labelled, covered = (
        maths_dtype(student.hidden.dtype),
        student.labels >= 0,
        target.covered,
    )
    log_p = torch.where(covered, target.log_probs.double(), -1.0)
    log_of_label = torch.nn.functional.logsigmoid(margins.double())
    log_q = torch.where(covered, _of_chunks(log_of_label, target), -1.0)
    loss = two_outcomes(log_p, log_q, weights.divergence, weights.temperature)
    kd = torch.where(covered, loss / target.labels.double(), 0.0).to(dtype)
    ce = torch.where(labelled, -torch.nn.functional.logsigmoid(margins), 0.0)
    factor = covered.to(dtype)
    if weights.weighting:
        factor = factor * _factor(log_p, log_q.detach(), weights.weighting).to(dtype)
    total = _weighed(kd, factor * weights.alpha) + _weighed(ce, weights.beta)
    return FusedLoss(total, kd.detach(), ce.detach(), factor)


def _weighed(term: Tensor, weight: float | Tensor) -> Tensor:
    """A term by its weight; nothing where that is 0, whatever the term."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, weight * term)
    return term * weight if weight else torch.zeros_like(term)


def two_outcomes(
    log_p: Tensor, log_q: Tensor, divergence: Divergence, temperature: float
) -> Tensor:
    """T D between P^(1/T) and its complement and Q^(1/T) and its own, [t] float64; differentiable
    by ``log_q``, both log-probabilities in float64."""
    p, q = (_with_complement(x / temperature) for x in (log_p, log_q))
    if divergence.kind == "forward_kl":
        loss = _kl(p, q)
    elif divergence.kind == "reverse_kl":
        loss = _kl(q, p)
    else:
        w = divergence.mixture
        assert w is not None, "a kind with a mixture"
        mixed = torch.logaddexp(p + math.log(w), q + math.log1p(-w))
        loss = _kl(p, mixed)
        if divergence.kind == "jsd":
            loss = w * loss + (1 - w) * _kl(q, mixed)
    return temperature * loss


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of two outcomes with log-probabilities [2, t]."""
    return (p.exp() * (p - q)).sum(0)


def _with_complement(log_p: Tensor) -> Tensor:
    """log P and log(1 - P), [2, t]."""
    log_p = log_p.clamp(_LOWEST, _HIGHEST)
    complement: Tensor = _Log1mExp.apply(log_p)
    return torch.stack([log_p, complement])


class _Log1mExp(torch.autograd.Function):
    """log(1 - exp(x)) of x < 0; autograd through its two branches would give NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        near = x > -0.6931471805599453
        y = torch.where(near, (-x.expm1()).log(), (-x.exp()).log1p())
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        x, y = ctx.saved_tensors
        return -(x - y).exp() * grad_outputs[0]


def _of_chunks(log_of_label: Tensor, target: Aligned) -> Tensor:
    """At each label the sum over its chunk, [t] float64; of those of no chunk together."""
    numbers = torch.where(target.covered, target.chunk, target.chunks)
    sums = log_of_label.new_zeros(target.chunks + 1).index_add(0, numbers, log_of_label)
    if target.cp_group is not None:
        sums = _Summed.apply(sums, target.cp_group)
    return sums[numbers]


class _Summed(torch.autograd.Function):
    """Sums over a group; each rank's loss depends on all ranks' terms, so gradients are summed."""

    @staticmethod
    def forward(ctx: Any, terms: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = terms.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        total = grad_outputs[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _factor(log_p: Tensor, log_q: Tensor, weighting: TokenWeighting) -> Tensor:
    """How much of its distillation each chunk keeps, [t] between 0 and 1."""
    factor = log_p.exp() if weighting.confidence == "label" else torch.ones_like(log_p)
    return factor.masked_fill(log_p < log_q, 0) if weighting.skip_worse else factor
