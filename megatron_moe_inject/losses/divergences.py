"""Divergence between student and teacher logits that exist already, sharded over the vocabulary.

Shapes: v vocabulary, p tensor-parallel size. For logits that need not exist at all see
``fused.py``; the maths of both is in ``rows.py``.

The gradient is written by hand, because collectives inside autograd go wrong quietly: a raw
all-reduce has no backward, and the backward of an all-gather sums the TP copies of the same loss.
It is computed in the forward pass and kept in the student's dtype, so the teacher's logits can be
freed at once and code that overwrites the student's afterwards (Megatron's vocabulary-parallel
cross-entropy does, in fp32) does no harm.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_moe_inject.losses.rows import (
    Divergence,
    RowStats,
    VocabShard,
    add_mixture,
    divergence_gradient,
    exchange,
    local_statistics,
    merge,
    mixture_terms,
)

# Elements of one block of rows: bounds the temporaries to a few times 4 bytes each.
_BLOCK_ELEMENTS = 1 << 22


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
        student_logits, teacher_logits, divergence, temperature, shard, with_gradient
    )


def check_temperature(temperature: float | Tensor) -> None:
    """Raise ValueError unless a temperature given as a number is positive and finite."""
    if not isinstance(temperature, Tensor) and not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be positive and finite")


class _VocabParallelDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_logits, teacher_logits, divergence, temperature, shard, with_gradient):
        x = student_logits.reshape(-1, student_logits.shape[-1])[:, : shard.columns]
        y = teacher_logits.reshape(-1, teacher_logits.shape[-1])[:, : shard.columns]
        blocks = _row_blocks(x)

        stats = _statistics(x, y, blocks, divergence, temperature, shard)
        if with_gradient:
            gradient = torch.zeros_like(student_logits, memory_format=torch.contiguous_format)
            flat = gradient.view(-1, gradient.shape[-1])
            for rows in blocks:
                part = divergence_gradient(
                    x[rows], y[rows], stats.rows(rows), divergence, temperature
                )
                flat[rows, : shard.columns] = part.mul_(temperature)
            ctx.save_for_backward(gradient)
        return (stats.divergence * temperature**2).view(student_logits.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        (gradient,) = ctx.saved_tensors
        out = torch.empty_like(gradient)
        return torch.mul(gradient, grad_loss.unsqueeze(-1), out=out), *[None] * 5


def _row_blocks(x: Tensor) -> list[slice]:
    tokens, columns = x.shape
    step = max(1, _BLOCK_ELEMENTS // max(columns, 1))
    return [slice(start, start + step) for start in range(0, max(tokens, 1), step)]


def _statistics(x, y, blocks, divergence, temperature, shard) -> RowStats:
    """The statistics of all rows, block by block, with one exchange for all of them."""
    parts = [
        local_statistics(x[rows], y[rows], None, divergence, temperature, shard) for rows in blocks
    ]
    local = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    stats = merge(exchange(local, shard), None, divergence, temperature)
    if divergence.mixture is not None:
        terms = [
            mixture_terms(x[rows], y[rows], stats.rows(rows), divergence, temperature)
            for rows in blocks
        ]
        stats = add_mixture(stats, torch.cat(terms, dim=1), shard)
    return stats
