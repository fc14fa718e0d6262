"""What is done with one chunk of tokens of the fused loss: logits, losses, their gradient.

Shapes: t tokens (here those of one chunk), h student hidden, c columns of this rank that hold real
ids.

``fused.py`` decides which of this runs in which pass; nothing here keeps anything. What differs
between targets is here in two places: ``teacher_logits``, for those that have logits of every id,
and ``Plan.statistics`` with ``Plan.logit_gradient``, for those that do not.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_moe_inject.losses.committee import mix
from megatron_moe_inject.losses.head_gradient import HeadGradient
from megatron_moe_inject.losses.products import head_logits, hidden_gradient
from megatron_moe_inject.losses.rows import (
    LogitRows,
    RowKernels,
    RowStats,
    distillation_factor,
    known,
    logit_gradient,
    row_statistics,
)
from megatron_moe_inject.losses.sparse import (
    SparseRows,
    SparseStats,
    sparse_gradient,
    sparse_statistics,
)
from megatron_moe_inject.losses.spec import (
    Divergence,
    LogitTransform,
    TokenWeighting,
    VocabShard,
)
from megatron_moe_inject.losses.target import Dense, Mixed, TeacherLogits


def teacher_logits(
    target: Dense | Mixed,
    labels: Tensor,
    temperature: float | Tensor,
    shard: VocabShard,
    weighting: TokenWeighting | None = None,
) -> TeacherLogits:
    """What a target with logits of every id says about a chunk.

    Args:
        target: of the chunk's t tokens.
        labels: [t] global ids, negative where there is none.
        temperature: T of the logits' distribution, a number or [t].
        shard: this rank's part of the vocabulary.
        weighting: what the teacher's cross-entropy and entropy are wanted for.

    Collectives over the shard's group: for a committee those of ``committee.mix``.
    """
    if isinstance(target, Mixed):
        return mix(target, labels, temperature, shard, weighting)
    return TeacherLogits(target.logits(shard.columns))


@dataclass(frozen=True)
class Plan:
    """What one call of the fused loss computes, and how; no tensor of the call but ``transform``'s.

    ``divergence`` is None without a target; ``transform`` is the student's. ``kernels`` and
    ``chunk_tokens`` are what the options mean here.
    """

    shard: VocabShard
    transform: LogitTransform | None
    divergence: Divergence | None
    weighting: TokenWeighting | None
    kernels: RowKernels | None
    chunk_tokens: int
    kd_gradient: bool
    ce_gradient: bool
    hidden_gradient: bool
    head_gradient: bool
    reduce_hidden_grad: bool
    accumulate_main_grad: bool

    def teacher(self, chunk: "Inputs") -> TeacherLogits | None:
        """``teacher_logits`` of a chunk; None where its target does not say that."""
        if chunk.target is None or isinstance(chunk.target, SparseRows):
            return None
        return teacher_logits(
            chunk.target, chunk.labels, chunk.temperature, self.shard, self.weighting
        )

    def logits(self, chunk: "Inputs", teacher: TeacherLogits | None) -> LogitRows:
        """Student and teacher logits of a chunk, [t, c] each."""
        x = head_logits(chunk.hidden, chunk.head)
        if self.transform:
            self.transform.apply_(x)
        y = None if teacher is None else teacher.logits
        return LogitRows(x, y, chunk.labels, chunk.temperature, self.transform, self.kernels)

    def statistics(
        self, chunk: "Inputs", logits: LogitRows, teacher: TeacherLogits | None
    ) -> tuple[RowStats, SparseStats | None]:
        """Their losses."""
        if isinstance(chunk.target, SparseRows):
            assert self.divergence is not None, "a target has a divergence"
            stats = row_statistics(logits, None, self.shard)
            sparse = sparse_statistics(logits, chunk.target, self.divergence, self.shard)
            return stats._replace(divergence=sparse.divergence), sparse
        if teacher is None or teacher.ce is None:
            return row_statistics(logits, self.divergence, self.shard, self.weighting), None
        stats = row_statistics(logits, self.divergence, self.shard)
        return stats._replace(y_ce=teacher.ce, y_entropy=teacher.entropy), None

    def kd_weight(self, chunk: "Inputs", stats: RowStats) -> Tensor:
        """alpha times the factor of the token weighting, [t]."""
        if not self.weighting:
            return chunk.alpha
        return chunk.alpha * distillation_factor(stats, chunk.labels, self.weighting, self.shard)

    def logit_gradient(
        self,
        chunk: "Inputs",
        logits: LogitRows,
        stats: RowStats,
        sparse: SparseStats | None,
    ) -> Tensor:
        """Derivative of the chunk's losses by head @ hidden, written over the logits, [t, c]."""
        kd = self.kd_weight(chunk, stats) if self.kd_gradient else None
        ce = chunk.beta if self.ce_gradient else None
        if sparse is None or kd is None:
            logit_gradient(logits, stats, self.divergence, self.shard, kd, ce, out=logits.x)
            return logits.x
        assert isinstance(chunk.target, SparseRows), "whose statistics these are"
        out = logits.x if ce is None else torch.empty_like(logits.x)
        sparse_gradient(logits, chunk.target, sparse, self.shard, kd, out)
        if ce is not None:
            logit_gradient(logits, stats, None, self.shard, None, ce, out=logits.x)
            logits.x.add_(out)
        return logits.x

    def chunks(self, tokens: int) -> list[slice]:
        """The token slices, one empty slice when there is no token."""
        step = self.chunk_tokens
        return [slice(start, start + step) for start in range(0, max(tokens, 1), step)]


class Inputs(NamedTuple):
    """The tensors of one call, or of one chunk of it.

    ``target`` is None without a teacher, and where the gradient does not need what it says.
    """

    hidden: Tensor
    head: Tensor
    labels: Tensor
    temperature: float | Tensor
    alpha: Tensor
    beta: Tensor
    upstream_mask: Tensor | None
    target: Dense | Mixed | SparseRows | None

    def chunk(self, rows: slice, columns: int) -> "Inputs":
        """Some tokens, and of the student's head the rows of real vocabulary ids."""
        temperature = self.temperature
        return Inputs(
            self.hidden[rows],
            self.head[:columns],
            self.labels[rows],
            temperature[rows] if isinstance(temperature, Tensor) else temperature,
            self.alpha[rows],
            self.beta[rows],
            None if self.upstream_mask is None else self.upstream_mask[rows],
            None if self.target is None else self.target.changed(lambda tensor: tensor[rows]),
        )


# One function call per chunk, so that its logits are freed before those of the next are made.


def statistics_and_gradient(
    chunk: Inputs, plan: Plan
) -> tuple[RowStats, SparseStats | None, Tensor]:
    """Statistics of a chunk and the gradient of its losses by head @ hidden, [t, c]."""
    teacher = plan.teacher(chunk)
    logits = plan.logits(chunk, teacher)
    stats, sparse = plan.statistics(chunk, logits, teacher)
    return stats, sparse, plan.logit_gradient(chunk, logits, stats, sparse)


def forward_chunk(
    chunk: Inputs, plan: Plan, unscaled: Tensor | None, head: HeadGradient | None
) -> tuple[RowStats, SparseStats | None]:
    """Statistics of a chunk, and the gradients that need no scale from above.

    Writes the gradient by the hidden states to ``unscaled`` [t, h] and adds the head's, with the
    tokens weighted by ``upstream_mask``, to ``head``; None leaves one out.
    """
    if unscaled is None and head is None:
        teacher = plan.teacher(chunk)
        return plan.statistics(chunk, plan.logits(chunk, teacher), teacher)
    stats, sparse, gradient = statistics_and_gradient(chunk, plan)
    if unscaled is not None:
        hidden_gradient(gradient, chunk.head, out=unscaled)
    if head is not None:
        head.add(gradient, chunk.hidden, known(chunk.upstream_mask))
    return stats, sparse


def recomputed_gradient(
    chunk: Inputs, stats: RowStats, sparse: SparseStats | None, plan: Plan
) -> Tensor:
    """What ``statistics_and_gradient`` gave, from logits made again."""
    return plan.logit_gradient(chunk, plan.logits(chunk, plan.teacher(chunk)), stats, sparse)
