"""Language-model head, cross-entropy and distillation in one pass that never holds full logits.

Shapes: t tokens, h student hidden, h_t teacher hidden, v vocabulary, p tensor-parallel size.

The tokens go through in chunks. Of each chunk the student's and the teacher's logits exist only
long enough to give the loss and its gradient by the logits (maths in ``rows.py``), which a further
matrix product turns into a gradient by the student's hidden states.

The gradient that arrives from above, one number per token (loss mask, loss scale, 1/tokens), is not
known in the forward pass, but it only scales a token's row. Hence two ways:

- Head frozen: the forward pass keeps the unscaled gradient by the hidden states, [t, h], and the
  backward pass scales it. 3 matrix products per chunk; no logits twice.
- Head trained: its gradient mixes tokens, so the scale has to be known first. Keeping the gradient
  by all logits, [t, v/p], is what a fused loss is there to avoid, but one chunk of it is within the
  budget anyway: the last chunk's is kept, 4 products. Of the others the forward pass keeps a few
  numbers per token, and the backward pass computes their logits again: 2 + 4 products.

Without gradients (``torch.no_grad()``, or nothing that requires them) only the 2 products of the
values run.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_moe_inject.losses.checks import (
    check_sparse_teacher,
    check_student,
    check_teacher,
    may_be_nonzero,
)
from megatron_moe_inject.losses.head_gradient import HeadGradient
from megatron_moe_inject.losses.rows import (
    LogitRows,
    RowKernels,
    RowStats,
    distillation_factor,
    logit_gradient,
    maths_dtype,
    row_statistics,
)
from megatron_moe_inject.losses.sparse import (
    SparseStats,
    SparseTarget,
    SparseTeacher,
    sparse_gradient,
    sparse_statistics,
)
from megatron_moe_inject.losses.spec import (
    Divergence,
    LogitTransform,
    TokenWeighting,
    VocabShard,
    check_temperature,
)

# Memory for the logits of one chunk, by device type: GPUs need larger chunks for busy products.
_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}


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
    kernels: RowKernels | None = None,
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
        kernels: goes through the logits' columns instead of torch operations, such as
            ``TritonRows()`` on a GPU; the same on every rank of ``tp_group``. With a sparse teacher
            only for the cross-entropy.

    Returns:
        FusedLoss; ``total`` is differentiable by ``student_hidden`` and ``student_weight``, with
        any upstream gradient per token. Every rank of ``tp_group`` gets the same bits.

    Raises:
        ValueError: shapes, dtypes or parameters that do not fit, with the values.

    Collectives over ``tp_group``. Forward, per chunk of c tokens: one all-gather of at most 7 c
    float32 numbers (10 c with a weighting), and for jsd and skew_kl one all-reduce of 2 c; with a
    sparse teacher one all-gather of 3 c and one of (k + 2) c. Backward: one all-reduce of
    ``student_hidden``'s size and dtype with ``reduce_hidden_grad``, nothing else.
    """
    check_temperature(temperature)
    check_student(student_hidden, student_weight, labels, temperature, alpha, beta)
    if sparse_teacher is None:
        check_teacher(
            student_hidden, student_weight, teacher_hidden, teacher_weight, alpha, weighting
        )
    else:
        check_sparse_teacher(student_hidden, teacher_hidden, sparse_teacher, kind, weighting)
        if isinstance(temperature, Tensor):
            raise ValueError("a sparse teacher is stored at one temperature; give a number")
    with_teacher = teacher_hidden is not None or sparse_teacher is not None
    shard = VocabShard.of(student_weight.shape[0], tp_group, valid_vocab_size)
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(student_hidden, student_weight)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1")

    plan = _Plan(
        divergence=Divergence(kind, jsd_beta, skew) if with_teacher else None,
        shard=shard,
        kd_gradient=with_teacher and may_be_nonzero(alpha),
        ce_gradient=may_be_nonzero(beta),
        chunk_tokens=chunk_tokens,
        hidden_gradient=torch.is_grad_enabled() and student_hidden.requires_grad,
        weight_gradient=torch.is_grad_enabled() and student_weight.requires_grad,
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
        kernels=kernels,
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
            plan,
        )
    )


def default_chunk_tokens(student_hidden: Tensor, student_weight: Tensor) -> int:
    """Tokens per chunk whose logits stay within 64 MiB on a CPU and 512 MiB on a GPU.

    A token takes 2 * v/p * itemsize bytes: the student's logits, which its gradient overwrites, and
    the teacher's. (The float32 copies of the row maths live in small blocks.) Rounded down to a
    multiple of 64 where that leaves anything, and evened out over the chunks.
    """
    per_token = max(1, 2 * student_weight.shape[0] * student_weight.element_size())
    budget = _CHUNK_BYTES.get(student_hidden.device.type, _CHUNK_BYTES["cuda"])
    limit = max(1, budget // per_token)
    tokens = max(1, len(student_hidden))
    even = -(-tokens // -(-tokens // limit))
    return min(limit // 64 * 64 or limit, -(-even // 64) * 64)


@dataclass(frozen=True)
class _Plan:
    divergence: Divergence | None
    shard: VocabShard
    kd_gradient: bool
    ce_gradient: bool
    chunk_tokens: int
    hidden_gradient: bool
    weight_gradient: bool
    reduce_hidden_grad: bool
    accumulate_main_grad: bool
    weighting: TokenWeighting | None
    student_transform: LogitTransform | None
    teacher_transform: LogitTransform | None
    sparse: SparseTarget | None
    kernels: RowKernels | None

    def of(self, rows: slice) -> "_Plan":
        """The plan for some of the tokens."""
        return self if self.sparse is None else replace(self, sparse=self.sparse.rows(rows))

    def logits(self, chunk: "_Inputs") -> LogitRows:
        """Student and teacher logits of a chunk, [t, c] each."""
        x, y = chunk.hidden @ chunk.weight.t(), None
        if self.student_transform:
            self.student_transform.apply_(x)
        if chunk.teacher_hidden is not None:
            y = chunk.teacher_hidden @ chunk.teacher_weight.t()
            if self.teacher_transform:
                self.teacher_transform.apply_(y)
        return LogitRows(
            x, y, chunk.labels, chunk.temperature, self.student_transform, self.kernels
        )

    def statistics(self, logits: LogitRows) -> tuple[RowStats, SparseStats | None]:
        """Their losses."""
        if self.sparse is None:
            return row_statistics(logits, self.divergence, self.shard, self.weighting), None
        stats = row_statistics(logits, None, self.shard)
        sparse = sparse_statistics(logits, self.sparse, self.divergence, self.shard)
        return stats._replace(divergence=sparse.divergence), sparse

    def kd_weight(self, chunk: "_Inputs", stats: RowStats) -> Tensor:
        """alpha times the factor of the token weighting, [t]."""
        if not self.weighting:
            return chunk.alpha
        return chunk.alpha * distillation_factor(stats, chunk.labels, self.weighting, self.shard)

    def logit_gradient(
        self,
        logits: LogitRows,
        stats: RowStats,
        sparse: SparseStats | None,
        kd_weight: Tensor,
        ce_weight: Tensor,
    ) -> Tensor:
        """Derivative of kd_weight kd + ce_weight ce by head @ hidden, written over the logits."""
        kd = kd_weight if self.kd_gradient else None
        ce = ce_weight if self.ce_gradient else None
        if sparse is None or kd is None:
            dense = self.divergence if sparse is None else None
            logit_gradient(logits, stats, dense, self.shard, kd, ce, out=logits.x)
            return logits.x
        out = logits.x if ce is None else torch.empty_like(logits.x)
        sparse_gradient(logits, self.sparse, sparse, self.shard, kd, out)
        if ce is not None:
            logit_gradient(logits, stats, None, self.shard, None, ce, out=logits.x)
            logits.x.add_(out)
        return logits.x

    def chunks(self, tokens: int) -> list[slice]:
        """The token slices, one empty slice when there is no token."""
        step = self.chunk_tokens
        return [slice(start, start + step) for start in range(0, max(tokens, 1), step)]


class _Inputs(NamedTuple):
    """The tensors of one call, or of one chunk of it."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    labels: Tensor
    temperature: float | Tensor
    alpha: Tensor
    beta: Tensor

    def chunk(self, rows: slice, columns: int) -> "_Inputs":
        """Some tokens, and of the heads the rows of real vocabulary ids."""
        with_teacher = self.teacher_hidden is not None
        per_token = isinstance(self.temperature, Tensor)
        return _Inputs(
            self.hidden[rows],
            self.weight[:columns],
            self.teacher_hidden[rows] if with_teacher else None,
            self.teacher_weight[:columns] if with_teacher else None,
            self.labels[rows],
            self.temperature[rows] if per_token else self.temperature,
            self.alpha[rows],
            self.beta[rows],
        )


class _FusedLinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, labels, temperature, alpha,
                beta, plan):  # fmt: skip
        inputs = _Inputs(
            hidden, weight, teacher_hidden, teacher_weight, labels, temperature, alpha, beta
        )
        unscaled = kept = None
        if plan.hidden_gradient and not plan.weight_gradient:
            unscaled = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        chunks, parts, sparse_parts = plan.chunks(len(hidden)), [], []
        for rows in chunks:
            chunk, own = inputs.chunk(rows, plan.shard.columns), plan.of(rows)
            if plan.weight_gradient and rows is chunks[-1]:
                chunk_stats, sparse_stats, kept = _statistics_and_gradient(chunk, own)
            else:
                out = None if unscaled is None else unscaled[rows]
                chunk_stats, sparse_stats = _forward_chunk(chunk, own, out)
            parts.append(chunk_stats)
            sparse_parts.append(sparse_stats)
        stats = RowStats.cat(parts)

        ctx.plan = plan
        if plan.weight_gradient:
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
            ctx.save_for_backward(unscaled)
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
        if plan.weight_gradient:
            grad_hidden, grad_weight = _gradients_with_head(ctx, grad_total)
        else:
            (unscaled,) = ctx.saved_tensors
            grad_hidden, grad_weight = torch.empty_like(unscaled), None
            torch.mul(unscaled, grad_total[:, None], out=grad_hidden)
        if plan.hidden_gradient and plan.reduce_hidden_grad and plan.shard.group is not None:
            dist.all_reduce(grad_hidden, group=plan.shard.group)
        return grad_hidden, grad_weight, *[None] * 7


# One function call per chunk, so that its logits are freed before those of the next are made.


def _statistics_and_gradient(
    chunk: _Inputs, plan: _Plan
) -> tuple[RowStats, SparseStats | None, Tensor]:
    """Statistics of a chunk and the gradient of its losses by head @ hidden, [t, c]."""
    logits = plan.logits(chunk)
    stats, sparse = plan.statistics(logits)
    kd_weight = plan.kd_weight(chunk, stats)
    return stats, sparse, plan.logit_gradient(logits, stats, sparse, kd_weight, chunk.beta)


def _forward_chunk(
    chunk: _Inputs, plan: _Plan, unscaled: Tensor | None
) -> tuple[RowStats, SparseStats | None]:
    """Statistics of a chunk; writes its gradient by the hidden states to ``unscaled`` [t, h]."""
    if unscaled is None:
        return plan.statistics(plan.logits(chunk))
    stats, sparse, gradient = _statistics_and_gradient(chunk, plan)
    torch.mm(gradient, chunk.weight, out=unscaled)
    return stats, sparse


def _recomputed_gradient(
    chunk: _Inputs, stats: RowStats, sparse: SparseStats | None, plan: _Plan
) -> Tensor:
    """What ``_statistics_and_gradient`` gave, from logits made again."""
    logits, kd_weight = plan.logits(chunk), plan.kd_weight(chunk, stats)
    return plan.logit_gradient(logits, stats, sparse, kd_weight, chunk.beta)


def _gradients_with_head(ctx, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by the hidden states (this rank's part) and by the head.

    The scale from above, [t], multiplies rows of [t, h] tensors, never of logits.
    """
    plan = ctx.plan
    saved, kept, ctx.kept = ctx.saved_tensors, ctx.kept, None
    inputs = _Inputs(*saved[: len(_Inputs._fields)])
    stats = RowStats(*saved[len(_Inputs._fields) :])
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
            gradient = _recomputed_gradient(chunk, stats.rows(rows), sparse, plan.of(rows))
        scale = grad_total[rows, None]
        if grad_hidden is not None:
            torch.mm(gradient, chunk.weight, out=grad_hidden[rows])
            torch.mul(grad_hidden[rows], scale, out=grad_hidden[rows])
        head.add(gradient, (chunk.hidden * scale).to(chunk.hidden.dtype))
        kept = gradient = None
    return grad_hidden, head.finish()


def _per_token(weight: float | Tensor, hidden: Tensor) -> Tensor:
    dtype = maths_dtype(hidden.dtype)
    if isinstance(weight, Tensor):
        return weight.detach().to(dtype)
    return torch.full(hidden.shape[:1], weight, dtype=dtype, device=hidden.device)
