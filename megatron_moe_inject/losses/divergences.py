"""Divergence between student and teacher logits that exist already, sharded over the vocabulary.

Shapes: v vocabulary, p tensor-parallel size. For logits that need not exist at all see
``fused.py``; the maths of both is in ``rows.py``.

The gradient is written by hand, because collectives inside autograd go wrong quietly: a raw
all-reduce has no backward, and the backward of an all-gather sums the TP copies of the same loss.
It is computed in the forward pass and kept in the student's dtype, so the teacher's logits can be
freed at once and code that overwrites the student's afterwards (Megatron's vocabulary-parallel
cross-entropy does, in fp32) does no harm.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_moe_inject.losses.rows import (
    LogitRows,
    RowKernels,
    known,
    logit_gradient,
    row_statistics,
)
from megatron_moe_inject.losses.spec import Divergence, VocabShard, check_temperature
from megatron_moe_inject.losses.triton_rows import AUTO, kernels_for


def vocab_parallel_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: str,
    temperature: float = 1.0,
    tp_group: ProcessGroup | None = None,
    valid_vocab_size: int | None = None,
    beta: float = 0.5,
    skew: float = 0.1,
    kernels: RowKernels | str | None = AUTO,
) -> Tensor:
    """T^2 times the divergence of every token, differentiable by the student's logits.

    Args:
        student_logits: [..., v/p], any floating dtype; left unmodified.
        teacher_logits: [..., v/p], the same ids on the same rank; a constant, may hold -inf (an
            excluded id); left unmodified.
        kind: "forward_kl" KL(P||Q), "reverse_kl" KL(Q||P), "jsd" or "skew_kl", with P the teacher's
            and Q the student's distribution, both at the temperature.
        temperature: T > 0.
        tp_group: the group over whose ranks the vocabulary is sharded, equally and in rank order;
            None for logits that are not sharded.
        valid_vocab_size: global ids from here on are padding: no probability on either side and a
            gradient of 0. None when there is no padding.
        beta: the teacher's weight in the generalised Jensen-Shannon divergence, 0 < beta < 1.
        skew: the teacher's weight in the mixture that skew KL measures against, 0 < skew < 1.
        kernels: goes through the columns, the same on every rank of ``tp_group``; None for torch
            operations. By default ``TritonRows()`` on a GPU, see ``triton_rows.kernels_for``.

    Returns:
        [...] in float32 (float64 for float64 logits), the same on every rank of ``tp_group``.
        Exactly 0, with a gradient of exactly 0, where both sides have equal logits. Reverse KL is
        +inf (and its gradient NaN) where the teacher excludes an id that the student does not.

    Raises:
        ValueError: an unknown kind, a parameter out of range, or shapes that differ.

    Collectives over ``tp_group``, n tokens: in the forward pass one all-gather of 5 n float32
    numbers (4 n for jsd and skew_kl, which add one all-reduce of 2 n); none in the backward pass.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits {tuple(student_logits.shape)} and teacher_logits "
            f"{tuple(teacher_logits.shape)} must have one shape: the same ids on the same rank"
        )
    check_temperature(temperature)
    shard = VocabShard.of(student_logits.shape[-1], tp_group, valid_vocab_size)
    divergence = Divergence(kind, beta, skew)
    with_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    return _VocabParallelDivergence.apply(
        student_logits, teacher_logits, divergence, temperature, shard,
        kernels_for(kernels, student_logits, teacher_logits), with_gradient,
    )  # fmt: skip


class _VocabParallelDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher_logits: Tensor,
        divergence: Divergence,
        temperature: float,
        shard: VocabShard,
        kernels: RowKernels | None,
        with_gradient: bool,
    ) -> Tensor:
        tokens, width = student_logits.shape[:-1], student_logits.shape[-1]
        logits = LogitRows(
            student_logits.reshape(-1, width)[:, : shard.columns],
            teacher_logits.reshape(-1, width)[:, : shard.columns],
            labels=None,
            temperature=temperature,
            kernels=kernels,
        )
        stats = row_statistics(logits, divergence, shard)
        losses = known(stats.divergence)
        if with_gradient:
            gradient = torch.zeros_like(student_logits, memory_format=torch.contiguous_format)
            out = gradient.view(-1, width)[:, : shard.columns]
            one = torch.ones_like(losses)
            logit_gradient(logits, stats, divergence, shard, one, None, out)
            ctx.save_for_backward(gradient)
        return (losses * temperature**2).view(tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_loss,) = grad_outputs
        (gradient,) = ctx.saved_tensors
        out = torch.empty_like(gradient)
        return torch.mul(gradient, grad_loss.unsqueeze(-1), out=out), *[None] * 6
