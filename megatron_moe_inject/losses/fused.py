"""Language-model head, cross-entropy and distillation in one pass that never holds full logits.

Shapes: t tokens, h student hidden, h_t teacher hidden, v vocabulary, p tensor-parallel size.

The tokens go through in chunks. Of each chunk the student's and the teacher's logits exist only
long enough to give the loss and its gradient by the logits (maths in ``rows.py``), which a further
matrix product turns into a gradient by the student's hidden states.

The gradient that arrives from above, one number per token (loss mask, loss scale, 1/tokens), is not
known in the forward pass, but it only scales a token's row. Hence three ways:

- Head frozen: the forward pass keeps the unscaled gradient by the hidden states, [t, h] in float32,
  and the backward pass scales and rounds it. 3 matrix products per chunk; no logits twice.
- Head trained: its gradient mixes tokens, so the scale has to be known first. Keeping the gradient
  by all logits, [t, v/p], is what a fused loss is there to avoid, but one chunk of it is within the
  budget anyway: the last chunk's is kept, 4 products. Of the others the forward pass keeps a few
  numbers per token, and the backward pass computes their logits again: 2 + 4 products.
- Head trained, and the caller says in ``upstream_mask`` how the scales will relate: the forward
  pass forms both gradients, the head's as if the scales were the mask, and the backward pass
  multiplies by the factor in between. 4 products, no logits twice. The price is that a float32
  buffer of the head's size lives from the forward to the backward pass of each call. Where the
  gradient goes into ``main_grad``, that is memory which the second way does not take.

Without gradients (``torch.no_grad()``, or nothing that requires them) only the 2 products of the
values run.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_moe_inject.losses.checks import (
    check_committee,
    check_sparse_teacher,
    check_student,
    check_teacher,
    may_be_nonzero,
)
from megatron_moe_inject.losses.chunks import (
    Inputs,
    Plan,
    forward_chunk,
    recomputed_gradient,
    statistics_and_gradient,
)
from megatron_moe_inject.losses.committee import Committee
from megatron_moe_inject.losses.head_gradient import HeadGradient
from megatron_moe_inject.losses.products import hidden_gradient
from megatron_moe_inject.losses.rows import RowKernels, RowStats, distillation_factor, maths_dtype
from megatron_moe_inject.losses.sparse import SparseTarget, SparseTeacher
from megatron_moe_inject.losses.spec import (
    Divergence,
    LogitTransform,
    TokenWeighting,
    VocabShard,
    check_temperature,
)
from megatron_moe_inject.losses.triton_rows import AUTO, kernels_for
from megatron_moe_inject.losses.upstream import common_factor

# Memory for the logits of one chunk, by device type: GPUs need larger chunks for busy products.
_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
# The same beside the sum of a head's gradient, as a share of that sum. On an H100 a half took 0.84
# of the time of a quarter, with the same peak, which the end of the sum makes.
_CHUNK_SHARE = {"cpu": 1 / 4, "cuda": 1 / 2}


class FusedLoss(NamedTuple):
    """Per-token losses [t] in float32. ``total`` = alpha factor kd + beta ce carries the graph.

    ``kd`` is T^2 times the divergence, 0 without a teacher; ``ce`` the cross-entropy, 0 where the
    label is negative. Both are detached and not multiplied by their weights. ``kd_factor`` is what
    the token weighting left of the distillation, 1 without one. A token contributes nothing to
    ``total`` and the gradient through a term whose weight is 0, whatever its value.
    """

    total: Tensor
    kd: Tensor
    ce: Tensor
    kd_factor: Tensor


def fused_linear_distillation(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor,
    *,
    kind: str = "forward_kl",
    temperature: float | Tensor = 1.0,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 0.0,
    jsd_beta: float = 0.5,
    skew: float = 0.1,
    tp_group: ProcessGroup | None = None,
    valid_vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    reduce_hidden_grad: bool = True,
    accumulate_main_grad: bool = False,
    weighting: TokenWeighting | None = None,
    student_transform: LogitTransform | None = None,
    teacher_transform: LogitTransform | None = None,
    sparse_teacher: SparseTeacher | None = None,
    committee: Committee | None = None,
    upstream_mask: Tensor | None = None,
    kernels: RowKernels | str | None = AUTO,
) -> FusedLoss:
    """alpha T^2 D(teacher || student) + beta CE of every token, from hidden states and heads.

    Args:
        student_hidden: [t, h], what the student's head reads; the same on all of ``tp_group``.
        student_weight: [v/p, h], this rank's rows of the student's head, same dtype.
        teacher_hidden: [t, h_t], a constant. None together with ``teacher_weight`` leaves out all
            teacher work; alpha must then be the number 0.
        teacher_weight: [v/p, h_t], the same vocabulary ids as ``student_weight``, same dtype as
            ``teacher_hidden``; a constant.
        labels: [t] int64 global ids; a negative label has no cross-entropy (its KD counts, by
            alpha). A label that is padding or beyond the vocabulary gives a cross-entropy of +inf.
        kind, jsd_beta, skew: the divergence, see ``vocab_parallel_divergence``.
        temperature: T > 0 of the divergence, a number or [t]. The cross-entropy is always at 1.
        alpha, beta: weights of KD and of CE, numbers or [t]; constants. The number 0 skips the
            gradient of the term; its value is still reported.
        tp_group: the group over whose ranks both heads are sharded, equally and in rank order;
            None for heads that are not sharded.
        valid_vocab_size: global ids from here on are padding, see ``vocab_parallel_divergence``.
        chunk_tokens: tokens per chunk, the same on every rank of ``tp_group``; None for
            ``default_chunk_tokens``. Losses do not depend on it, up to rounding in the products.
        reduce_hidden_grad: sum the gradient by ``student_hidden`` over ``tp_group``. False leaves
            this rank's part, for a caller whose own backward sums: under sequence parallelism, the
            reduce-scatter behind the gather of the hidden states.
        accumulate_main_grad: add the head's gradient to ``student_weight.main_grad`` instead of
            returning it, as Megatron's gradient accumulation fusion does.
        weighting: distils confident tokens more, see ``TokenWeighting``; needs a teacher.
        student_transform, teacher_transform: what makes logits of ``hidden @ weight.T``, see
            ``LogitTransform``; None for nothing.
        sparse_teacher: stored ids [t, k] of a teacher in place of its hidden states and head, at
            one temperature for all tokens.
        committee: several teachers [t, h_k] in place of one, their distributions mixed at the
            temperature; ``weighting`` then uses the mixture's cross-entropy and entropy, with the
            same weights. A committee of one is that teacher.
        upstream_mask: [t], a constant, of the order of 1: the promise that the gradient which
            arrives at ``total`` will be one number times it, as with a loss of
            ``(total * mask).sum() / tokens``. It is not applied to ``total``, only makes the
            gradient of a trained head cheaper. A broken promise (checked without host
            synchronisation, see ``common_factor``) makes the head's gradient NaN; that by the
            hidden states is right all the same. The graph can go through one backward pass only.
        kernels: goes through the logits' columns, the same on every rank of ``tp_group``; None for
            torch operations. By default ``TritonRows()`` on a GPU, see
            ``triton_rows.kernels_for``. With a sparse teacher only for the cross-entropy.

    Returns:
        FusedLoss; ``total`` is differentiable by ``student_hidden`` and ``student_weight``, with
        any upstream gradient per token, or the promised. Every rank of ``tp_group`` gets the same
        bits.

    Raises:
        ValueError: shapes, dtypes or parameters that do not fit, with the values.

    Collectives over ``tp_group``. Forward, per chunk of c tokens: one all-gather of at most 7 c
    float32 numbers (10 c with a weighting), and for jsd and skew_kl one all-reduce of 2 c; with a
    sparse teacher one all-gather of 3 c and one of (k + 2) c; with a committee those of
    ``committee.mix`` besides. Backward: one all-reduce of ``student_hidden``'s size and dtype with
    ``reduce_hidden_grad``, and nothing else but those of ``committee.mix`` for every chunk whose
    logits are computed again.
    """
    check_temperature(temperature)
    check_student(
        student_hidden, student_weight, labels=labels, temperature=temperature, alpha=alpha,
        beta=beta, upstream_mask=upstream_mask,
    )  # fmt: skip
    if committee is not None and len(committee.members) == 1:
        check_committee(student_hidden, student_weight, teacher_hidden, committee)
        (member,), committee = committee.members, None
        teacher_hidden, teacher_weight, teacher_transform = (
            member.hidden, member.head, member.transform,
        )  # fmt: skip
    if committee is not None:
        check_committee(student_hidden, student_weight, teacher_hidden, committee)
        if sparse_teacher is not None:
            raise ValueError("give committee or sparse_teacher, not both")
    elif sparse_teacher is None:
        check_teacher(
            student_hidden, student_weight, teacher_hidden, teacher_weight, alpha, weighting
        )
    else:
        check_sparse_teacher(student_hidden, teacher_hidden, sparse_teacher, kind, weighting)
        if isinstance(temperature, Tensor):
            raise ValueError("a sparse teacher is stored at one temperature; give a number")
    with_teacher = any(t is not None for t in (teacher_hidden, sparse_teacher, committee))
    shard = VocabShard.of(student_weight.shape[0], tp_group, valid_vocab_size)
    weight_gradient = torch.is_grad_enabled() and student_weight.requires_grad
    if not weight_gradient:
        upstream_mask = None
    if chunk_tokens is None:
        summed = weight_gradient and (upstream_mask is not None or not accumulate_main_grad)
        chunk_tokens = default_chunk_tokens(
            student_hidden, student_weight, head_gradient=summed, mixed=committee is not None
        )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1")

    plan = Plan(
        divergence=Divergence(kind, jsd_beta, skew) if with_teacher else None,
        shard=shard,
        kd_gradient=with_teacher and may_be_nonzero(alpha),
        ce_gradient=may_be_nonzero(beta),
        chunk_tokens=chunk_tokens,
        hidden_gradient=torch.is_grad_enabled() and student_hidden.requires_grad,
        weight_gradient=weight_gradient,
        reduce_hidden_grad=reduce_hidden_grad,
        accumulate_main_grad=accumulate_main_grad,
        weighting=weighting or None,
        student_transform=student_transform or None,
        teacher_transform=teacher_transform or None,
        sparse=None
        if sparse_teacher is None
        else SparseTarget.of(
            sparse_teacher.ids,
            sparse_teacher.log_probs.detach(),
            kind=kind,
            tail=sparse_teacher.tail,
            vocab_size=shard.valid,
            dtype=maths_dtype(student_hidden.dtype),
        ),
        committee=None if committee is None else committee.changed(Tensor.detach),
        kernels=kernels_for(kernels, student_hidden, teacher_hidden),
    )
    if plan.weight_gradient and accumulate_main_grad:
        HeadGradient.check(student_weight)
    return FusedLoss(
        *_FusedLinearDistillation.apply(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            temperature,
            _per_token(alpha, student_hidden),
            _per_token(beta, student_hidden),
            None if upstream_mask is None else _per_token(upstream_mask, student_hidden),
            plan,
        )
    )


def default_chunk_tokens(
    student_hidden: Tensor,
    student_weight: Tensor,
    *,
    head_gradient: bool = False,
    mixed: bool = False,
) -> int:
    """Tokens per chunk whose logits stay within 64 MiB on a CPU and 512 MiB on a GPU.

    With ``head_gradient``, for a head's gradient with a sum of its own, also within a quarter of
    that float32 sum on a CPU and half of it on a GPU if it is more: every chunk reads and writes
    the sum once, so a few large chunks are faster, for memory in proportion to what the gradient
    takes.

    A token takes 2 * v/p * itemsize bytes: the student's logits, which its gradient overwrites, and
    the teacher's; with a committee (``mixed``) also those of its mixture in float32. (The float32
    copies of the row maths live in small blocks.) Rounded down to a multiple of 64 where that
    leaves anything, and evened out over the chunks.
    """
    itemsize = 2 * student_weight.element_size()
    if mixed:
        itemsize += maths_dtype(student_weight.dtype).itemsize
    per_token = max(1, student_weight.shape[0] * itemsize)
    budget = _CHUNK_BYTES.get(student_hidden.device.type, _CHUNK_BYTES["cuda"])
    if head_gradient:
        dtype = maths_dtype(student_weight.dtype)
        share = _CHUNK_SHARE.get(student_hidden.device.type, _CHUNK_SHARE["cuda"])
        budget = max(budget, int(student_weight.numel() * dtype.itemsize * share))
    limit = max(1, budget // per_token)
    tokens = max(1, len(student_hidden))
    even = -(-tokens // -(-tokens // limit))
    return min(limit // 64 * 64 or limit, -(-even // 64) * 64)


class _FusedLinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, labels, temperature, alpha,
                beta, upstream_mask, plan):  # fmt: skip
        inputs = Inputs(
            hidden, weight, teacher_hidden, teacher_weight, labels, temperature, alpha, beta,
            upstream_mask,
        )  # fmt: skip
        unscaled = head = kept = None
        twice = plan.weight_gradient and upstream_mask is None
        if plan.hidden_gradient and not twice:
            unscaled = hidden.new_empty(hidden.shape, dtype=maths_dtype(hidden.dtype))
        if upstream_mask is not None:
            head = HeadGradient(weight, plan.accumulate_main_grad, factor_later=True)
        chunks, parts, sparse_parts = plan.chunks(len(hidden)), [], []
        for rows in chunks:
            chunk, own = inputs.chunk(rows, plan.shard.columns), plan.of(rows)
            if twice and rows is chunks[-1]:
                chunk_stats, sparse_stats, kept = statistics_and_gradient(chunk, own)
            else:
                out = None if unscaled is None else unscaled[rows]
                chunk_stats, sparse_stats = forward_chunk(chunk, own, out, head)
            parts.append(chunk_stats)
            sparse_parts.append(sparse_stats)
        stats = RowStats.cat(parts)

        again = twice and plan.kd_gradient  # whether the backward pass mixes a committee again
        ctx.plan = plan if again else replace(plan, committee=None)
        ctx.twice, ctx.head, ctx.dtype = twice, head, hidden.dtype
        if twice:
            ctx.sparse_parts = sparse_parts
            ctx.kept = kept  # no saved tensor, so that the backward pass can free it
            ctx.weight = weight
            ctx.temperature = temperature
            if not isinstance(temperature, Tensor):
                inputs = inputs._replace(temperature=None)
            if not plan.kd_gradient:
                inputs = inputs._replace(teacher_hidden=None, teacher_weight=None)
            unused = {"divergence": None} if plan.weighting else {"divergence": None, "ce": None}
            ctx.save_for_backward(*inputs, *stats._replace(**unused))
        else:
            ctx.save_for_backward(unscaled, upstream_mask)
        kd, factor = torch.zeros_like(alpha), torch.ones_like(alpha)
        if plan.divergence is not None:
            kd = stats.divergence * temperature**2
        if plan.weighting:
            factor = distillation_factor(stats, labels, plan.weighting, plan.shard)
        kd_weight = alpha * factor
        total = torch.where(kd_weight == 0, 0.0, kd_weight * kd) + torch.where(
            beta == 0, 0.0, beta * stats.ce
        )
        ctx.mark_non_differentiable(kd, stats.ce, factor)
        return total, kd, stats.ce, factor

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, *_detached):
        plan = ctx.plan
        gradients = _recomputed_gradients if ctx.twice else _scaled_gradients
        grad_hidden, grad_weight = gradients(ctx, grad_total)
        if plan.hidden_gradient and plan.reduce_hidden_grad and plan.shard.group is not None:
            dist.all_reduce(grad_hidden, group=plan.shard.group)
        return grad_hidden, grad_weight, *[None] * 8


# Both give the gradients by the hidden states (this rank's part) and by the head.


def _scaled_gradients(ctx, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Those of the forward pass, multiplied."""
    unscaled, mask = ctx.saved_tensors
    grad_hidden = grad_weight = None
    if mask is not None:
        head, ctx.head = ctx.head, None
        if head is None:
            raise RuntimeError(
                "with upstream_mask the first backward pass gives the head's gradient away; leave "
                "it out where the graph is retained for another"
            )
        grad_weight = head.finish(common_factor(grad_total, mask, head.weight.dtype))
    if unscaled is not None:
        grad_hidden = unscaled.new_empty(unscaled.shape, dtype=ctx.dtype)
        torch.mul(unscaled, grad_total[:, None], out=grad_hidden)
    return grad_hidden, grad_weight


def _recomputed_gradients(ctx, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """From logits made again, but for the last chunk's.

    The scale from above, [t], multiplies rows of [t, h] tensors, never of logits.
    """
    plan = ctx.plan
    saved, kept, ctx.kept = ctx.saved_tensors, ctx.kept, None
    inputs = Inputs(*saved[: len(Inputs._fields)])
    stats = RowStats(*saved[len(Inputs._fields) :])
    if inputs.temperature is None:
        inputs = inputs._replace(temperature=ctx.temperature)

    grad_hidden = None
    if plan.hidden_gradient:
        grad_hidden = torch.empty_like(inputs.hidden, memory_format=torch.contiguous_format)
    head = HeadGradient(ctx.weight, plan.accumulate_main_grad)
    chunks = plan.chunks(len(grad_total))
    # The kept chunk first: its memory is free before another's is taken. (A second backward pass
    # through a retained graph finds none and computes it again.)
    for rows, sparse in zip(reversed(chunks), reversed(ctx.sparse_parts), strict=True):
        chunk, gradient = inputs.chunk(rows, plan.shard.columns), kept
        if gradient is None:
            gradient = recomputed_gradient(chunk, stats.rows(rows), sparse, plan.of(rows))
        scale = grad_total[rows]
        if grad_hidden is not None:
            wide = scale.new_empty(chunk.hidden.shape, dtype=maths_dtype(chunk.hidden.dtype))
            hidden_gradient(gradient, chunk.weight, out=wide)
            torch.mul(wide, scale[:, None], out=grad_hidden[rows])
        head.add(gradient, chunk.hidden, scale)
        kept = gradient = None
    return grad_hidden, head.finish()


def _per_token(weight: float | Tensor, hidden: Tensor) -> Tensor:
    dtype = maths_dtype(hidden.dtype)
    if isinstance(weight, Tensor):
        return weight.detach().to(dtype)
    return torch.full(hidden.shape[:1], weight, dtype=dtype, device=hidden.device)
