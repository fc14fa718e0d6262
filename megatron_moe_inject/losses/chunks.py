"""What is done with one chunk of tokens of the fused loss: logits, losses, their gradient.

Shapes: t tokens (here those of one chunk), h student hidden, c columns of this rank that hold real
ids.

``fused.py`` decides which of this runs in which pass; nothing here keeps anything. What differs
between targets is here in two places: ``teacher_logits``, for those that have logits of every id,
and ``Plan.statistics`` with ``Plan.logit_gradient``, for those that do not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_moe_inject.losses.committee import mix
from megatron_moe_inject.losses.head_gradient import HeadGradient
from megatron_moe_inject.losses.head_rows import (
    HeadRows,
    LowRankHead,
    low_rank_gradient,
    student_logits,
    taken_columns,
)
from megatron_moe_inject.losses.margins import hide_labels, margin_statistics
from megatron_moe_inject.losses.products import hidden_gradient
from megatron_moe_inject.losses.rows import (
    LogitRows,
    RowKernels,
    RowStats,
    distillation_factor,
    known,
    logit_gradient,
    maths_dtype,
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
    ``chunk_tokens`` are what the options mean here. ``trained`` names the tensors of the head that
    get a gradient, among ``HEAD_TENSORS``. With ``margin`` the cross-entropy is minus the label's
    margin, see ``margins.py``.
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
    trained: tuple[str, ...]
    reduce_hidden_grad: bool
    accumulate_main_grad: bool
    margin: bool = False

    def teacher(self, chunk: "Inputs") -> TeacherLogits | None:
        """``teacher_logits`` of a chunk; None where its target does not say that."""
        if chunk.target is None or isinstance(chunk.target, SparseRows):
            return None
        return teacher_logits(
            chunk.target, chunk.labels, chunk.temperature, self.shard, self.weighting
        )

    def logits(self, chunk: "Inputs", teacher: TeacherLogits | None) -> LogitRows:
        """Student and teacher logits of a chunk, [t, c] each."""
        x = student_logits(chunk.hidden, chunk.head, chunk.head_rows, chunk.low_rank)
        if self.transform:
            self.transform.apply_(x)
        y = None if teacher is None else teacher.logits
        return LogitRows(x, y, chunk.labels, chunk.temperature, self.transform, self.kernels)

    def statistics(
        self, chunk: "Inputs", logits: LogitRows, teacher: TeacherLogits | None
    ) -> tuple[RowStats, SparseStats | None]:
        """Their losses."""
        if self.margin:
            return margin_statistics(logits, self.shard), None
        if isinstance(chunk.target, SparseRows):
            assert self.divergence is not None, "a target has a divergence"
            stats = row_statistics(logits, None, self.shard)
            sparse = sparse_statistics(logits, chunk.target, self.divergence, self.shard)
            stats = stats._replace(divergence=sparse.divergence)
            if self.weighting:
                stats = stats._replace(y_ce=known(chunk.target.label).neg())
            return stats, sparse
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
        """Derivative of the chunk's losses by head @ hidden, written over the logits, [t, c].

        By the head with all that changes it.
        """
        if self.margin:
            hide_labels(logits, self.shard)
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


HEAD_TENSORS = ("head", "values", "a", "b")
"""The tensors of ``Inputs`` that logits are made of and that may train, in their order there."""


class Inputs(NamedTuple):
    """The tensors of one call, or of one chunk of it.

    ``values`` and ``places`` are those of ``HeadRows``, ``a``, ``b`` and ``scale`` those of
    ``LowRankHead``, None where the head has none. ``target`` is None without a teacher, and where
    the gradient does not need what it says.
    """

    hidden: Tensor
    head: Tensor
    values: Tensor | None
    a: Tensor | None
    b: Tensor | None
    places: Tensor | None
    labels: Tensor
    alpha: Tensor
    beta: Tensor
    upstream_mask: Tensor | None
    temperature: float | Tensor
    scale: float
    target: Dense | Mixed | SparseRows | None

    @property
    def head_rows(self) -> HeadRows | None:
        """Rows of the head that have values of their own."""
        return None if self.values is None else HeadRows(known(self.places), self.values)

    @property
    def low_rank(self) -> LowRankHead | None:
        """What is added to the head."""
        return None if self.a is None else LowRankHead(self.a, known(self.b), self.scale)

    def chunk(self, rows: slice, columns: int) -> "Inputs":
        """Some tokens, and of the student's head the rows of real vocabulary ids."""
        temperature = self.temperature
        return self._replace(
            hidden=self.hidden[rows],
            head=self.head[:columns],
            labels=self.labels[rows],
            temperature=temperature[rows] if isinstance(temperature, Tensor) else temperature,
            alpha=self.alpha[rows],
            beta=self.beta[rows],
            upstream_mask=None if self.upstream_mask is None else self.upstream_mask[rows],
            target=None if self.target is None else self.target.changed(lambda x: x[rows]),
        )


class HeadSums:
    """Sums over chunks of the gradients of what trains of a head.

    Args:
        inputs: of the call.
        plan: tells what trains.
        factor_later: see ``HeadGradient``.

    Attributes:
        of: the sums, by the names of ``Plan.trained``.
    """

    def __init__(self, inputs: Inputs, plan: Plan, *, factor_later: bool = False) -> None:
        self.of = {
            name: HeadGradient(
                getattr(inputs, name), plan.accumulate_main_grad and name == "head", factor_later
            )
            for name in plan.trained
        }

    def add(self, name: str, gradient: Tensor, states: Tensor, scale: Tensor) -> None:
        """Add a chunk to one tensor's, if that trains; see ``HeadGradient.add``."""
        if name in self.of:
            self.of[name].add(gradient, states, scale)

    def finish(self, factor: Tensor | None = None) -> Mapping[str, Tensor | None]:
        """What autograd receives, by name; ``factor`` multiplies the sums."""
        return {name: total.finish(factor) for name, total in self.of.items()}


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
    chunk: Inputs,
    plan: Plan,
    unscaled: Tensor | None,
    sums: HeadSums | None,
    columns: Tensor | None,
) -> tuple[RowStats, SparseStats | None]:
    """Statistics of a chunk, and the gradients that need no scale from above.

    Writes the gradient by the hidden states to ``unscaled`` [t, h] and that by the logits of rows
    with values of their own to ``columns`` [t, k], and adds the head's, with the tokens weighted by
    ``upstream_mask``, to ``sums``; None leaves one out.
    """
    if unscaled is None and sums is None and columns is None:
        teacher = plan.teacher(chunk)
        return plan.statistics(chunk, plan.logits(chunk, teacher), teacher)
    stats, sparse, gradient = statistics_and_gradient(chunk, plan)
    chunk_gradients(chunk, gradient, unscaled, sums, chunk.upstream_mask, columns)
    return stats, sparse


def chunk_gradients(
    chunk: Inputs,
    gradient: Tensor,
    out: Tensor | None,
    sums: HeadSums | None,
    scale: Tensor | None,
    columns: Tensor | None = None,
) -> None:
    """From a chunk's gradient by head @ hidden [t, c] those by all that the logits are made of.

    Args:
        chunk: of t tokens.
        gradient: as of ``Plan.logit_gradient``; written over.
        out: [t, h] in the dtype of the maths, gets the gradient by the hidden states.
        sums: gets those of what trains of the head.
        scale: [t] for ``sums``.
        columns: [t, k], gets the gradient by the logits of rows with values of their own.

    No collectives. ``out`` and the sum of ``a`` are this rank's part; the whole is the sum over its
    ``tp_group``.
    """
    rows, low_rank = chunk.head_rows, chunk.low_rank
    by_rows = narrow = None
    if low_rank is not None:
        narrow = low_rank_gradient(
            gradient, low_rank.b, low_rank.scale, maths_dtype(gradient.dtype)
        )
    if sums is not None:
        scale = known(scale)
        sums.add("head", gradient, chunk.hidden, scale)
        if low_rank is not None:
            sums.add("a", known(narrow), chunk.hidden, scale)
            states = chunk.hidden @ low_rank.a.t()
            sums.add("b", gradient, states, scale * low_rank.scale)
    if rows is not None:
        by_rows = taken_columns(gradient, rows.columns, columns)
        if sums is not None:
            sums.add("values", by_rows, chunk.hidden, known(scale))
    if out is None:
        return
    hidden_gradient(gradient, chunk.head, out)
    if rows is not None:
        hidden_gradient(known(by_rows), rows.values, out, add=True)
    if low_rank is not None:
        hidden_gradient(known(narrow), low_rank.a, out, add=True)


def recomputed_gradient(
    chunk: Inputs, stats: RowStats, sparse: SparseStats | None, plan: Plan
) -> Tensor:
    """What ``statistics_and_gradient`` gave, from logits made again."""
    return plan.logit_gradient(chunk, plan.logits(chunk, plan.teacher(chunk)), stats, sparse)
