"""Language-model head, cross-entropy and distillation in one pass that never holds full logits.

Shapes: t tokens, h student hidden, h_t teacher hidden, v vocabulary, p tensor-parallel size.

The tokens go through in chunks. Of each chunk the student's and the teacher's logits exist only
long enough to give the loss and its gradient by the logits (maths in ``rows.py``), which a further
matrix product turns into a gradient by the student's hidden states.

The gradient that arrives from above, one number per token (loss mask, loss scale, 1/tokens), is not
known in the forward pass, but it only scales a token's row. Hence three ways:

- Head frozen: the forward pass keeps the unscaled gradient by the hidden states, [t, h] in float32,
  and the backward pass scales and rounds it. 3 matrix products per chunk; no logits twice. Where k
  of its rows have values of their own that train (``head_rows.py``), it keeps the gradient by their
  logits as well, [t, k]; 3 products of k columns more.
- Head trained: its gradient mixes tokens, so the scale has to be known first. Keeping the gradient
  by all logits, [t, v/p], is what a fused loss is there to avoid, but one chunk of it is within the
  budget anyway: the last chunk's is kept, 4 products. Of the others the forward pass keeps a few
  numbers per token, and the backward pass computes their logits again: 2 + 4 products.
- Head trained, and the caller says in ``upstream_mask`` how the scales will relate: the forward
  pass forms both gradients, the head's as if the scales were the mask, and the backward pass
  multiplies by the factor in between. 4 products, no logits twice. The price is that a float32
  buffer of the head's size lives from the forward to the backward pass of each call. Where the
  gradient goes into ``main_grad``, that is memory which the second way does not take. A frozen
  head's rows take a sum of [k, h] in this way, whatever t is.
A correction of low rank goes the ways of a trained head, with products of r columns in the place of
the head's own gradient.

Without gradients (``torch.no_grad()``, or nothing that requires them) only the 2 products of the
values run.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_moe_inject.losses.checks import (
    check_distilled,
    check_flat,
    check_per_token,
    may_be_nonzero,
)
from megatron_moe_inject.losses.chunk_size import default_chunk_tokens
from megatron_moe_inject.losses.chunks import (
    HEAD_TENSORS,
    HeadSums,
    Inputs,
    Plan,
    chunk_gradients,
    forward_chunk,
    recomputed_gradient,
    statistics_and_gradient,
)
from megatron_moe_inject.losses.head_gradient import HeadGradient
from megatron_moe_inject.losses.products import aligned
from megatron_moe_inject.losses.rows import (
    RowKernels,
    RowStats,
    distillation_factor,
    known,
    maths_dtype,
)
from megatron_moe_inject.losses.sparse import SparseRows
from megatron_moe_inject.losses.sparse_committee import as_sparse
from megatron_moe_inject.losses.spec import Divergence, TermWeights
from megatron_moe_inject.losses.student import Student, Vocabulary
from megatron_moe_inject.losses.target import Aligned, Dense, Mixed, Sparse, Target, single
from megatron_moe_inject.losses.triton_rows import AUTO, kernels_for
from megatron_moe_inject.losses.upstream import common_factor


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


@dataclass(frozen=True)
class FusedOptions:
    """How the fused loss runs. Losses do not depend on it, up to rounding.

    Attributes:
        chunk_tokens: tokens per chunk, the same on every rank of the vocabulary's ``tp_group``;
            None for ``default_chunk_tokens``.
        kernels: goes through the logits' columns, the same on every rank of ``tp_group``; None for
            torch operations. By default ``TritonRows()`` on a GPU, see
            ``triton_rows.kernels_for``. With a ``Sparse`` target only for the cross-entropy.
        reduce_hidden_grad: sum the gradient by the hidden states over ``tp_group``. False leaves
            this rank's part, for a caller whose own backward sums: under sequence parallelism, the
            reduce-scatter behind the gather of the hidden states. The same holds of the gradient by
            ``head_low_rank.a``, which Megatron sums where the parameter is ``sequence_parallel``.
        accumulate_main_grad: add the head's gradient to its ``main_grad`` instead of returning it,
            as Megatron's gradient accumulation fusion does.
        upstream_mask: [t], a constant, of the order of 1: the promise that the gradient which
            arrives at ``total`` will be one number times it, as with a loss of
            ``(total * mask).sum() / tokens``. It is not applied to ``total``, only makes the
            gradient of a trained head cheaper, or of what changes a frozen one. A broken promise
            (checked without host synchronisation, see ``common_factor``) makes that gradient NaN;
            that by the hidden states is right all the same. The graph can go through one backward
            pass only.
    """

    chunk_tokens: int | None = None
    kernels: RowKernels | str | None = AUTO
    reduce_hidden_grad: bool = True
    accumulate_main_grad: bool = False
    upstream_mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens={self.chunk_tokens} must be at least 1")


DEFAULT = FusedOptions()


def fused_loss(
    student: Student,
    target: Target | None,
    weights: TermWeights,
    options: FusedOptions = DEFAULT,
) -> FusedLoss:
    """alpha factor T^2 D(target || student) + beta CE of every token, from hidden states and heads.

    Args:
        student: hidden states [t, h], head [v/p, h], labels [t].
        target: what the teacher says about the same t tokens; a constant. None leaves out all
            teacher work; alpha must then be the number 0. A committee of one is that teacher. With
            a committee, ``weighting`` uses the mixture's cross-entropy and entropy. A ``Sparse``
            target, and a committee with one, takes only the temperature that it was stored at, no
            weighting by entropy, and others if it knows the probability of the label.
        weights: of the terms, and which divergence.
        options: how it runs.

    Returns:
        FusedLoss; ``total`` is differentiable by the student's ``hidden``, ``head`` and the tensors
        of ``head_rows`` and ``head_low_rank``, with any upstream gradient per token, or the
        promised. Every rank of the vocabulary's ``tp_group`` gets the same bits.

    Raises:
        ValueError: what does not fit, with the values.

    Collectives over ``tp_group``. Forward, per chunk of c tokens: one all-gather of at most 7 c
    float32 numbers (10 c with a weighting), and for jsd and skew_kl one all-reduce of 2 c; with a
    ``Sparse`` target one all-gather of 3 c and one of (k + 2) c; with a committee those of
    ``committee.mix`` besides, or where a member is ``Sparse`` once those of ``as_sparse``.
    Backward, with ``reduce_hidden_grad``: one all-reduce of the hidden states' size and dtype, and
    one of ``head_low_rank.a``'s if that trains; and nothing else but those of ``committee.mix`` for
    every chunk whose logits are computed again.
    """
    target = single(target)
    if isinstance(target, Aligned):
        raise ValueError("chunks of text are compared by aligned_loss, not by fused_loss")
    check_flat(student)
    check_per_token(
        student,
        temperature=weights.temperature,
        alpha=weights.alpha,
        beta=weights.beta,
        upstream_mask=options.upstream_mask,
    )
    check_distilled(student, target, weights)
    if isinstance(target, Mixed) and target.sparse:
        assert not isinstance(weights.temperature, Tensor), "checked: the stored ones' own"
        step = options.chunk_tokens or default_chunk_tokens(student.hidden, student.head)
        target = as_sparse(target, student.labels, weights.temperature, student.shard, step)
    return _computed(student, target, weights, options)


def label_margins(student: Student, options: FusedOptions = DEFAULT) -> Tensor:
    """How far each label's logit is above the rest, [t] float32; 0 where there is no label.

    Its margin m (``margins.py``) gives both log P(label) and log(1 - P(label)) to full precision.
    Differentiable as the loss of ``fused_loss`` is, with any gradient from above; that costs the
    same products as a cross-entropy's where the head is frozen.

    Args:
        student: hidden states [t, h], head [v/p, h], labels [t].
        options: how it runs; ``upstream_mask`` has no meaning here.

    Raises:
        ValueError: what does not fit; a gradient through soft-capped logits.

    Collectives: those of ``fused_loss`` without a target.
    """
    check_flat(student)
    trains = torch.is_grad_enabled() and (student.hidden.requires_grad or student.head_trains)
    if trains and student.transform and student.transform.softcap is not None:
        raise ValueError(
            f"softcap={student.transform.softcap}: margins of soft-capped logits have no gradient "
            "here; no student of Megatron's has them"
        )
    options = replace(options, upstream_mask=None)
    return -_computed(student, None, TermWeights(0.0, 1.0), options, margin=True).total


def _computed(
    student: Student,
    target: Dense | Mixed | Sparse | None,
    weights: TermWeights,
    options: FusedOptions,
    *,
    margin: bool = False,
) -> FusedLoss:
    """``fused_loss`` of what fits; with ``margin`` the cross-entropy is minus the margin."""
    hidden = student.hidden
    plan = replace(_plan(student, target, weights, options), margin=margin)
    if "head" in plan.trained and plan.accumulate_main_grad:
        HeadGradient.main_grad_of(student.head)
    constant: Dense | Mixed | SparseRows | None = None
    if isinstance(target, Sparse):
        constant = SparseRows.of(
            target,
            kind=weights.divergence.kind,
            vocab_size=plan.shard.valid,
            dtype=maths_dtype(hidden.dtype),
        )
    elif target is not None:
        constant = target.changed(Tensor.detach)
    upstream_mask = None
    if plan.trained and options.upstream_mask is not None:
        upstream_mask = _per_token(options.upstream_mask, hidden)
    rows, low_rank = student.placed_rows, student.head_low_rank
    inputs = Inputs(
        hidden=hidden,
        head=student.head,
        values=None if rows is None else rows.values,
        a=None if low_rank is None else low_rank.a,
        b=None if low_rank is None else low_rank.b,
        places=None if rows is None else rows.columns,
        labels=student.labels,
        alpha=_per_token(weights.alpha, hidden),
        beta=_per_token(weights.beta, hidden),
        upstream_mask=upstream_mask,
        temperature=weights.temperature,
        scale=0.0 if low_rank is None else low_rank.scale,
        target=constant,
    )
    return FusedLoss(*_FusedLoss.apply(plan, *inputs))


def _plan(
    student: Student, target: Target | None, weights: TermWeights, options: FusedOptions
) -> Plan:
    hidden, head = student.hidden, student.head
    trained = _trained(student) if torch.is_grad_enabled() else ()
    summed_apart = options.upstream_mask is not None or not options.accumulate_main_grad
    chunk_tokens = options.chunk_tokens or default_chunk_tokens(
        hidden,
        head,
        head_gradient="head" in trained and summed_apart,
        mixed=isinstance(target, Mixed),
    )
    teacher_hidden = target.hidden if isinstance(target, Dense) else None
    return Plan(
        shard=student.shard,
        transform=student.transform or None,
        divergence=None if target is None else weights.divergence,
        weighting=weights.weighting or None,
        kernels=kernels_for(options.kernels, hidden, teacher_hidden),
        chunk_tokens=chunk_tokens,
        kd_gradient=target is not None and may_be_nonzero(weights.alpha),
        ce_gradient=may_be_nonzero(weights.beta),
        hidden_gradient=torch.is_grad_enabled() and hidden.requires_grad,
        trained=trained,
        reduce_hidden_grad=options.reduce_hidden_grad,
        accumulate_main_grad=options.accumulate_main_grad,
    )


def _trained(student: Student) -> tuple[str, ...]:
    """Which of ``HEAD_TENSORS`` require a gradient."""
    rows, low_rank = student.head_rows, student.head_low_rank
    tensors = (
        student.head,
        None if rows is None else rows.values,
        None if low_rank is None else low_rank.a,
        None if low_rank is None else low_rank.b,
    )
    named = zip(HEAD_TENSORS, tensors, strict=True)
    return tuple(name for name, tensor in named if tensor is not None and tensor.requires_grad)


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
    tp_group: ProcessGroup | None = None,
    valid_vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> FusedLoss:
    """``fused_loss`` of one teacher by its hidden states and head, for scripts.

    Args:
        student_hidden, student_weight, labels: [t, h], [v/p, h] and [t], see ``Student``.
        teacher_hidden, teacher_weight: [t, h_t] and [v/p, h_t], see ``Dense``; None together for no
            teacher, with ``alpha=0``.
        kind: the divergence: forward_kl, reverse_kl, jsd or skew_kl, the mixtures with their
            default weights.
        temperature, alpha, beta: see ``TermWeights``.
        tp_group, valid_vocab_size: see ``Vocabulary``.
        chunk_tokens: see ``FusedOptions``.

    Returns, raises and collectives: as of ``fused_loss``.
    """
    if (teacher_hidden is None) != (teacher_weight is None):
        raise ValueError("give teacher_hidden and teacher_weight together, or neither")
    teacher = None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = Dense(teacher_hidden, teacher_weight)
    vocabulary = Vocabulary(tp_group, valid_vocab_size)
    return fused_loss(
        Student(student_hidden, student_weight, labels, vocabulary),
        teacher,
        TermWeights(alpha, beta, Divergence(kind), temperature),
        FusedOptions(chunk_tokens),
    )


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, *given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = Inputs(*given)
        hidden, upstream_mask, temperature = (
            inputs.hidden,
            inputs.upstream_mask,
            inputs.temperature,
        )
        unscaled = sums = last_gradient = columns = None
        promised = upstream_mask is not None
        twice = not promised and bool(set(plan.trained) - {"values"})
        if plan.hidden_gradient and not twice:
            unscaled = hidden.new_empty(hidden.shape, dtype=maths_dtype(hidden.dtype))
        if promised:
            sums = HeadSums(inputs, plan, factor_later=True)
        elif not twice and "values" in plan.trained:
            columns = aligned(hidden, len(hidden), len(known(inputs.values)))
        chunks, parts, sparse_parts = plan.chunks(len(hidden)), [], []
        for rows in chunks:
            chunk = inputs.chunk(rows, plan.shard.columns)
            if twice and rows is chunks[-1]:
                chunk_stats, sparse_stats, last_gradient = statistics_and_gradient(chunk, plan)
            else:
                out, by_rows = (None if x is None else x[rows] for x in (unscaled, columns))
                chunk_stats, sparse_stats = forward_chunk(chunk, plan, out, sums, by_rows)
            parts.append(chunk_stats)
            sparse_parts.append(sparse_stats)
        stats = RowStats.cat(parts)

        ctx.plan, ctx.twice, ctx.sums, ctx.dtype = plan, twice, sums, hidden.dtype
        if twice:
            ctx.sparse_parts = sparse_parts
            ctx.kept = last_gradient  # no saved tensor, so that the backward pass can free it
            ctx.head = inputs.head
            ctx.temperature, ctx.scale = temperature, inputs.scale
            target_tensors: tuple[Tensor, ...] = ()
            ctx.target_of = None
            if plan.kd_gradient:
                assert inputs.target is not None, "what is distilled"
                target_tensors, ctx.target_of = inputs.target.parts()
            tensors = [part if isinstance(part, Tensor) else None for part in inputs[:-1]]
            used = stats._replace(divergence=None)
            if not plan.weighting:
                used = used._replace(ce=None)
            ctx.save_for_backward(*tensors, *used, *target_tensors)
        else:
            of_rows = (None, None) if columns is None else (hidden, inputs.values)
            ctx.save_for_backward(unscaled, upstream_mask, columns, *of_rows)
        alpha, beta = inputs.alpha, inputs.beta
        kd, factor = torch.zeros_like(alpha), torch.ones_like(alpha)
        ce = known(stats.ce)
        if plan.divergence is not None:
            kd = known(stats.divergence) * temperature**2
        if plan.weighting:
            factor = distillation_factor(stats, inputs.labels, plan.weighting, plan.shard)
        kd_weight = alpha * factor
        total = torch.where(kd_weight == 0, 0.0, kd_weight * kd) + torch.where(
            beta == 0, 0.0, beta * ce
        )
        ctx.mark_non_differentiable(kd, ce, factor)
        return total, kd, ce, factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        plan, grad_total = ctx.plan, grad_outputs[0]  # the others are detached
        gradients = _recomputed_gradients if ctx.twice else _scaled_gradients
        grad_hidden, of_head = gradients(ctx, grad_total)
        if plan.reduce_hidden_grad and plan.shard.group is not None:
            for partial in (grad_hidden, of_head.get("a")):
                if partial is not None:
                    dist.all_reduce(partial, group=plan.shard.group)
        by_head = [of_head.get(name) for name in HEAD_TENSORS]
        constants = len(Inputs._fields) - 1 - len(HEAD_TENSORS)
        return None, grad_hidden, *by_head, *[None] * constants


# Both give the gradients by the hidden states (this rank's part) and by what trains of the head.

_Gradients = tuple[Tensor | None, Mapping[str, Tensor | None]]


def _scaled_gradients(ctx: Any, grad_total: Tensor) -> _Gradients:
    """Those of the forward pass, multiplied."""
    unscaled, mask, columns, hidden, values = ctx.saved_tensors
    grad_hidden, of_head = None, {}
    if mask is not None:
        sums, ctx.sums = ctx.sums, None
        if sums is None:
            raise RuntimeError(
                "with upstream_mask the first backward pass gives the head's gradient away; leave "
                "it out where the graph is retained for another"
            )
        of_head = sums.finish(common_factor(grad_total, mask, ctx.dtype))
    if columns is not None:
        of_rows = HeadGradient(values, accumulate_main_grad=False)
        for rows in ctx.plan.chunks(len(hidden)):
            of_rows.add(columns[rows], hidden[rows], grad_total[rows])
        of_head = {"values": of_rows.finish()}
    if unscaled is not None:
        grad_hidden = unscaled.new_empty(unscaled.shape, dtype=ctx.dtype)
        torch.mul(unscaled, grad_total[:, None], out=grad_hidden)
    return grad_hidden, of_head


def _recomputed_gradients(ctx: Any, grad_total: Tensor) -> _Gradients:
    """From logits made again, but for the last chunk's.

    The scale from above, [t], multiplies rows of [t, h] tensors, never of logits.
    """
    plan = ctx.plan
    saved, last_gradient, ctx.kept = iter(ctx.saved_tensors), ctx.kept, None
    tensors = itertools.islice(saved, len(Inputs._fields) - 1)
    inputs = Inputs._make([*tensors, None])._replace(head=ctx.head, scale=ctx.scale)
    stats = RowStats(*itertools.islice(saved, len(RowStats._fields)))
    if ctx.target_of is not None:
        inputs = inputs._replace(target=ctx.target_of(*saved))
    if inputs.temperature is None:
        inputs = inputs._replace(temperature=ctx.temperature)

    grad_hidden = wide = None
    if plan.hidden_gradient:
        grad_hidden = torch.empty_like(inputs.hidden, memory_format=torch.contiguous_format)
    sums = HeadSums(inputs, plan)
    chunks = plan.chunks(len(grad_total))
    # The kept chunk first: its memory is free before another's is taken. (A second backward pass
    # through a retained graph finds none and computes it again.)
    for rows, sparse in zip(reversed(chunks), reversed(ctx.sparse_parts), strict=True):
        chunk, gradient = inputs.chunk(rows, plan.shard.columns), last_gradient
        if gradient is None:
            gradient = recomputed_gradient(chunk, stats.rows(rows), sparse, plan)
        scale = grad_total[rows]
        if grad_hidden is not None:
            wide = scale.new_empty(chunk.hidden.shape, dtype=maths_dtype(chunk.hidden.dtype))
        chunk_gradients(chunk, gradient, wide, sums, scale)
        if grad_hidden is not None:
            torch.mul(known(wide), scale[:, None], out=grad_hidden[rows])
        last_gradient = gradient = wide = None
    return grad_hidden, sums.finish()


def _per_token(weight: float | Tensor, hidden: Tensor) -> Tensor:
    dtype = maths_dtype(hidden.dtype)
    if isinstance(weight, Tensor):
        return weight.detach().to(dtype)
    return torch.full(hidden.shape[:1], weight, dtype=dtype, device=hidden.device)
