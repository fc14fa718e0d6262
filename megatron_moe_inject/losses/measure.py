"""How well a student predicts a text, and how close it is to a teacher, token by token.

Shapes: t tokens, h student hidden, h_t teacher hidden, v vocabulary, p tensor-parallel size, c
columns of this rank that hold real ids.

As in ``fused``, logits exist for one chunk of tokens at a time and padded ids take no part. There
are no gradients, so a chunk costs the two matrix products, one pass over its columns and one small
exchange. All numbers are at temperature 1: what is measured does not depend on how a run distils.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_moe_inject.losses.checks import check_committee, check_student, check_teacher
from megatron_moe_inject.losses.committee import Committee, mix
from megatron_moe_inject.losses.fused import default_chunk_tokens
from megatron_moe_inject.losses.products import head_logits
from megatron_moe_inject.losses.rows import (
    LogitRows,
    RowKernels,
    all_statistics,
    exchange,
    label_logit,
    merge,
)
from megatron_moe_inject.losses.spec import Divergence, LogitTransform, VocabShard
from megatron_moe_inject.losses.triton_rows import AUTO, kernels_for

_FORWARD_KL = Divergence("forward_kl")


class TokenMeasures(NamedTuple):
    """Per-token numbers [t], float32 or float64 for float64 input; None without a teacher.

    Attributes:
        loss: the student's cross-entropy of the label in nats, 0 where the label is negative.
        top: the id that the student finds most likely, the lowest of several; int64.
        confidence: its probability.
        teacher_loss: the teacher's cross-entropy, 0 where the label is negative.
        teacher_top: the teacher's most likely id.
        kl: KL(teacher || student) in nats.
        teacher_confidence: the probability of the teacher's most likely id.
    """

    loss: Tensor
    top: Tensor
    confidence: Tensor
    teacher_loss: Tensor | None = None
    teacher_top: Tensor | None = None
    kl: Tensor | None = None
    teacher_confidence: Tensor | None = None

    @classmethod
    def cat(cls, parts: list[Self]) -> Self:
        """The measures of consecutive tokens as one."""
        fields = zip(*parts, strict=True)
        return cls(*(None if field[0] is None else torch.cat(field) for field in fields))


@torch.no_grad()
def measure_tokens(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor,
    *,
    tp_group: ProcessGroup | None = None,
    valid_vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    student_transform: LogitTransform | None = None,
    teacher_transform: LogitTransform | None = None,
    committee: Committee | None = None,
    kernels: RowKernels | str | None = AUTO,
) -> TokenMeasures:
    """Measure every token; the arguments are those of ``fused_linear_distillation``.

    Every rank of ``tp_group`` gets the same bits.

    Raises:
        ValueError: shapes or dtypes that do not fit, with the values.

    Collectives over ``tp_group``, per chunk of c tokens: one all-gather of 9 c float32 numbers,
    4 c without a teacher; with a committee those of ``committee.mix`` besides.
    """
    check_student(student_hidden, student_weight, labels=labels)
    check_teacher(student_hidden, student_weight, teacher_hidden, teacher_weight, 0, None)
    if committee is not None:
        check_committee(student_hidden, student_weight, teacher_hidden, committee)
    width = student_weight.shape[0]
    shard = VocabShard.of(width, tp_group, valid_vocab_size)
    step = chunk_tokens or default_chunk_tokens(
        student_hidden, student_weight, mixed=committee is not None
    )
    parts = []
    for start in range(0, max(len(student_hidden), 1), step):
        rows = slice(start, start + step)
        x, y = head_logits(student_hidden[rows], student_weight[: shard.columns]), None
        if student_transform:
            student_transform.apply_(x)
        if teacher_hidden is not None:
            y = head_logits(teacher_hidden[rows], teacher_weight[: shard.columns])
            if teacher_transform:
                teacher_transform.apply_(y)
        elif committee is not None:
            part = committee.changed(lambda hidden, rows=rows: hidden[rows])
            y = mix(part, labels[rows], 1.0, shard).logits
        logits = LogitRows(x, y, labels[rows], 1.0, kernels=kernels_for(kernels, x, y))
        parts.append(_measure_chunk(logits, shard, width))
    return TokenMeasures.cat(parts)


def _measure_chunk(logits: LogitRows, shard: VocabShard, width: int) -> TokenMeasures:
    divergence = None if logits.y is None else _FORWARD_KL
    ranks = exchange(_local(logits, divergence, shard), shard)
    stats = merge(ranks, logits, divergence)
    measures = TokenMeasures(stats.ce, _top(ranks, "x", width), stats.ce_lse.neg().exp())
    if divergence is None:
        return measures
    teacher_loss = stats.y_max - ranks["y_label_logit"].amax(0) + stats.y_lse
    return measures._replace(
        teacher_loss=torch.where(logits.labels >= 0, teacher_loss, 0.0),
        teacher_top=_top(ranks, "y", width),
        kl=stats.divergence,
        teacher_confidence=stats.y_lse.neg().exp(),
    )


def _local(
    logits: LogitRows, divergence: Divergence | None, shard: VocabShard
) -> dict[str, Tensor]:
    """``rows.all_statistics``, and for each model the column of its largest logit (exact in float32
    up to 2**24 columns)."""
    local = all_statistics(logits, divergence, shard, None)
    local["x_top"] = _top_column(logits.x, local["x_max"])
    if divergence is not None:
        local["y_top"] = _top_column(logits.y, local["y_max"])
        local["y_label_logit"] = label_logit(logits.y, logits.labels, shard)
    return local


def _top_column(logits: Tensor, like: Tensor) -> Tensor:
    if logits.shape[1] == 0:
        return torch.zeros_like(like)
    return logits.max(-1).indices.to(like.dtype)  # the first of equals; faster than argmax


def _top(ranks: dict[str, Tensor], model: str, width: int) -> Tensor:
    """Global id of the largest logit, [t]; of several ranks with the same maximum the first's."""
    rank = ranks[f"{model}_max"].argmax(0)
    column = ranks[f"{model}_top"].gather(0, rank[None]).squeeze(0)
    return rank * width + column.long()
