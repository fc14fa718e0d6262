"""What is done with one chunk of tokens of the fused loss: logits, losses, their gradient.

Shapes: t tokens (here those of one chunk), h student hidden, h_t teacher hidden, v vocabulary, p
tensor-parallel size, c columns of this rank that hold real ids.

``fused.py`` decides which of this runs in which pass; nothing here keeps anything.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_moe_inject.losses.committee import Committee, Mixture, mix
from megatron_moe_inject.losses.head_gradient import HeadGradient
from megatron_moe_inject.losses.products import head_logits, hidden_gradient
from megatron_moe_inject.losses.rows import (
    LogitRows,
    RowKernels,
    RowStats,
    distillation_factor,
    logit_gradient,
    row_statistics,
)
from megatron_moe_inject.losses.sparse import (
    SparseStats,
    SparseTarget,
    sparse_gradient,
    sparse_statistics,
)
from megatron_moe_inject.losses.spec import (
    Divergence,
    LogitTransform,
    TokenWeighting,
    VocabShard,
)


@dataclass(frozen=True)
class Plan:
    """What one call of the fused loss computes, and how."""

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
    committee: Committee | None
    kernels: RowKernels | None

    def of(self, rows: slice) -> "Plan":
        """The plan for some of the tokens."""
        if self.committee is not None:
            return replace(self, committee=self.committee.changed(lambda hidden: hidden[rows]))
        return self if self.sparse is None else replace(self, sparse=self.sparse.rows(rows))

    def mixture(self, chunk: "Inputs") -> Mixture | None:
        """What a committee of teachers says of a chunk; None without one."""
        if self.committee is None:
            return None
        return mix(self.committee, chunk.labels, chunk.temperature, self.shard, self.weighting)

    def logits(self, chunk: "Inputs", mixture: Mixture | None) -> LogitRows:
        """Student and teacher logits of a chunk, [t, c] each."""
        x, y = head_logits(chunk.hidden, chunk.weight), None
        if self.student_transform:
            self.student_transform.apply_(x)
        if chunk.teacher_hidden is not None:
            y = head_logits(chunk.teacher_hidden, chunk.teacher_weight)
            if self.teacher_transform:
                self.teacher_transform.apply_(y)
        elif mixture is not None:
            y = mixture.logits
        return LogitRows(
            x, y, chunk.labels, chunk.temperature, self.student_transform, self.kernels
        )

    def statistics(
        self, logits: LogitRows, mixture: Mixture | None
    ) -> tuple[RowStats, SparseStats | None]:
        """Their losses."""
        if mixture is not None:
            stats = row_statistics(logits, self.divergence, self.shard)
            return stats._replace(y_ce=mixture.ce, y_entropy=mixture.entropy), None
        if self.sparse is None:
            return row_statistics(logits, self.divergence, self.shard, self.weighting), None
        stats = row_statistics(logits, None, self.shard)
        sparse = sparse_statistics(logits, self.sparse, self.divergence, self.shard)
        return stats._replace(divergence=sparse.divergence), sparse

    def kd_weight(self, chunk: "Inputs", stats: RowStats) -> Tensor:
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


class Inputs(NamedTuple):
    """The tensors of one call, or of one chunk of it."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    labels: Tensor
    temperature: float | Tensor
    alpha: Tensor
    beta: Tensor
    upstream_mask: Tensor | None

    def chunk(self, rows: slice, columns: int) -> "Inputs":
        """Some tokens, and of the heads the rows of real vocabulary ids."""
        with_teacher = self.teacher_hidden is not None
        per_token = isinstance(self.temperature, Tensor)
        return Inputs(
            self.hidden[rows],
            self.weight[:columns],
            self.teacher_hidden[rows] if with_teacher else None,
            self.teacher_weight[:columns] if with_teacher else None,
            self.labels[rows],
            self.temperature[rows] if per_token else self.temperature,
            self.alpha[rows],
            self.beta[rows],
            None if self.upstream_mask is None else self.upstream_mask[rows],
        )


# One function call per chunk, so that its logits are freed before those of the next are made.


def statistics_and_gradient(
    chunk: Inputs, plan: Plan
) -> tuple[RowStats, SparseStats | None, Tensor]:
    """Statistics of a chunk and the gradient of its losses by head @ hidden, [t, c]."""
    mixture = plan.mixture(chunk)
    logits = plan.logits(chunk, mixture)
    stats, sparse = plan.statistics(logits, mixture)
    kd_weight = plan.kd_weight(chunk, stats)
    return stats, sparse, plan.logit_gradient(logits, stats, sparse, kd_weight, chunk.beta)


def forward_chunk(
    chunk: Inputs, plan: Plan, unscaled: Tensor | None, head: HeadGradient | None
) -> tuple[RowStats, SparseStats | None]:
    """Statistics of a chunk, and the gradients that need no scale from above.

    Writes the gradient by the hidden states to ``unscaled`` [t, h] and adds the head's, with the
    tokens weighted by ``upstream_mask``, to ``head``; None leaves one out.
    """
    if unscaled is None and head is None:
        mixture = plan.mixture(chunk)
        return plan.statistics(plan.logits(chunk, mixture), mixture)
    stats, sparse, gradient = statistics_and_gradient(chunk, plan)
    if unscaled is not None:
        hidden_gradient(gradient, chunk.weight, out=unscaled)
    if head is not None:
        head.add(gradient, chunk.hidden, chunk.upstream_mask)
    return stats, sparse


def recomputed_gradient(
    chunk: Inputs, stats: RowStats, sparse: SparseStats | None, plan: Plan
) -> Tensor:
    """What ``statistics_and_gradient`` gave, from logits made again."""
    mixture = plan.mixture(chunk) if plan.kd_gradient else None
    logits, kd_weight = plan.logits(chunk, mixture), plan.kd_weight(chunk, stats)
    return plan.logit_gradient(logits, stats, sparse, kd_weight, chunk.beta)
