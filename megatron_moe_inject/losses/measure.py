"""How well a student predicts a text, and how close it is to a teacher, token by token.

Shapes: t tokens, h student hidden, v vocabulary, p tensor-parallel size, c columns of this rank
that hold real ids, k stored ids per token.

As in ``fused``, logits exist for one chunk of tokens at a time and padded ids take no part. There
are no gradients, so a chunk costs the two matrix products, one pass over its columns and one small
exchange. All numbers are at temperature 1: what is measured does not depend on how a run distils.
"""

import operator
from dataclasses import replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from megatron_moe_inject.losses.checks import check_fits, check_flat
from megatron_moe_inject.losses.chunk_size import default_chunk_tokens
from megatron_moe_inject.losses.chunks import teacher_logits
from megatron_moe_inject.losses.head_rows import student_logits
from megatron_moe_inject.losses.rows import (
    LogitRows,
    RowKernels,
    all_statistics,
    exchange,
    known,
    label_logit,
    maths_dtype,
    merge,
)
from megatron_moe_inject.losses.sparse import SparseRows, sparse_statistics
from megatron_moe_inject.losses.sparse_committee import as_sparse
from megatron_moe_inject.losses.spec import Divergence, VocabShard
from megatron_moe_inject.losses.student import Student, Vocabulary
from megatron_moe_inject.losses.target import Aligned, Dense, Mixed, Sparse, Target, single
from megatron_moe_inject.losses.triton_rows import AUTO, kernels_for

_FORWARD_KL = Divergence("forward_kl")


class TokenMeasures(NamedTuple):
    """Per-token numbers [t], float32 or float64 for float64 input; None what no teacher tells.

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
        return cls._make(None if field[0] is None else torch.cat(field) for field in fields)


@torch.no_grad()
def measure_tokens(
    student: Student,
    target: Target | None = None,
    *,
    chunk_tokens: int | None = None,
    kernels: RowKernels | str | None = AUTO,
) -> TokenMeasures:
    """Measure every token.

    Args:
        student: hidden states [t, h], head [v/p, h], labels [t].
        target: what a teacher says about the same tokens. Of a ``Sparse`` one, or a committee with
            one, the loss is known if it knows the label's probability, and unless its ids were
            drawn (tail ``sample``) or are known at another temperature alone its most likely id,
            that id's probability, and the divergence of its ids and one outcome for all others,
            which is at most the whole; of an ``Aligned`` one the loss, a chunk's divided among its
            labels. What is not known stays None.
        chunk_tokens, kernels: see ``FusedOptions``.

    Every rank of the vocabulary's ``tp_group`` gets the same bits.

    Raises:
        ValueError: what does not fit, with the values.

    Collectives over ``tp_group``, per chunk of c tokens: one all-gather of 9 c float32 numbers,
    4 c without a teacher or with an ``Aligned`` one, with a ``Sparse`` one that and one of
    (k + 2) c; with a committee those of ``committee.mix`` or ``as_sparse`` besides.
    """
    check_flat(student)
    check_fits(student, target)
    shard, width = student.shard, len(student.head)
    aligned, target = (target, None) if isinstance(target, Aligned) else (None, target)
    step = chunk_tokens or default_chunk_tokens(
        student.hidden, student.head, mixed=isinstance(target, Mixed)
    )
    stored = outcomes = None
    if isinstance(target, Sparse) or (isinstance(target, Mixed) and target.sparse):
        stored, target = _at_one(target, student.labels, shard, step), None
        if stored.unit is not None:
            outcomes = SparseRows.of(
                replace(stored, tail="bucket"),
                kind=_FORWARD_KL.kind,
                vocab_size=shard.valid,
                dtype=maths_dtype(student.hidden.dtype),
            )
    head, head_rows, parts = student.head[: shard.columns], student.placed_rows, []
    for start in range(0, max(len(student.hidden), 1), step):
        rows = slice(start, start + step)
        labels = student.labels[rows]
        x = student_logits(student.hidden[rows], head, head_rows, student.head_low_rank)
        y = None
        if student.transform:
            student.transform.apply_(x)
        if target is not None:
            part = target.changed(operator.itemgetter(rows))
            y = teacher_logits(part, labels, 1.0, shard).logits
        logits = LogitRows(x, y, labels, 1.0, kernels=kernels_for(kernels, x, y))
        measured = _measure_chunk(logits, shard, width)
        if outcomes is not None:
            part_rows = outcomes.changed(operator.itemgetter(rows))
            kl = sparse_statistics(logits, part_rows, _FORWARD_KL, shard).divergence
            measured = measured._replace(kl=kl)
        parts.append(measured)
    measures = TokenMeasures.cat(parts)
    if aligned is not None:
        return measures._replace(teacher_loss=-aligned.per_label().to(measures.loss.dtype))
    return measures if stored is None else _beside_stored(measures, stored, student.labels)


def target_confidence(
    target: Target,
    kind: str,
    labels: Tensor,
    vocabulary: Vocabulary,
    *,
    kernels: RowKernels | str | None = AUTO,
) -> Tensor:
    """How sure a teacher is at each token, at temperature 1; [t] between 0 and 1.

    Args:
        target: what it says about t tokens.
        kind: ``label``, the probability of the label, 0 where that is negative or, of a ``Sparse``
            target that does not keep it, not among its ids; or ``top``, that of the most likely id,
            of a committee with a ``Sparse`` member of the most likely among the ids that it knows.
            The label's of an ``Aligned`` target is the geometric mean over its chunk, 0 where it is
            in none.
        labels: [t] int64 global ids.
        vocabulary: how the heads are sharded.
        kernels: see ``FusedOptions``.

    Raises:
        ValueError: what does not fit; a ``Sparse`` target that was stored at another temperature,
            or ``top`` of one whose ids were drawn, or of an ``Aligned`` one.

    Collectives: those of ``measure_tokens``; none for a ``Sparse`` or an ``Aligned`` target, those
    of ``as_sparse`` for a committee with a ``Sparse`` member.
    """
    target = single(target)
    if isinstance(target, Mixed) and target.sparse:
        head = target.dense[0].head if target.dense else None
        shard = VocabShard(0, 0, None, 1) if head is None else vocabulary.shard(len(head))
        step = max(1, len(labels))
        if head is not None:
            step = default_chunk_tokens(target.dense[0].hidden, head)
        target = _at_one(target, labels, shard, step)
    if isinstance(target, Sparse):
        return _stored_confidence(target, kind, labels)
    if isinstance(target, Aligned):
        if kind == "top":
            raise ValueError(
                "chunks of text do not tell the most likely id's probability; ask for the label's"
            )
        return target.per_label().exp() * target.covered
    if isinstance(target, Dense):  # stands where a student does: one product, not two
        alone = Student(target.hidden, target.head, labels, vocabulary, target.transform)
        measured = measure_tokens(alone, kernels=kernels)
        loss, top = measured.loss, measured.confidence
    else:
        first = target.dense[0]
        beside = Student(first.hidden, first.head, labels, vocabulary, first.transform)
        measured = measure_tokens(beside, target, kernels=kernels)
        loss, top = known(measured.teacher_loss), known(measured.teacher_confidence)
    return top if kind == "top" else loss.neg().exp() * (labels >= 0)


def _at_one(target: Sparse | Mixed, labels: Tensor, shard: VocabShard, chunk_tokens: int) -> Sparse:
    """What stored ids, alone or in a committee, tell at temperature 1; as it is where they tell
    nothing at that."""
    if isinstance(target, Sparse):
        return target.unit or target
    members = [member.unit if isinstance(member, Sparse) else member for member in target.members]
    known_at_one = tuple(member for member in members if member is not None)
    if len(known_at_one) < len(members):
        temperature = target.sparse[0].temperature
        return as_sparse(target, labels, temperature, shard, chunk_tokens)
    return as_sparse(replace(target, members=known_at_one), labels, 1.0, shard, chunk_tokens)


def _used(target: Sparse) -> Tensor:
    """Log-probabilities [..., k] with -inf in every unused slot."""
    return target.log_probs.masked_fill(target.ids < 0, -torch.inf).float()


def _beside_stored(measures: TokenMeasures, target: Sparse, labels: Tensor) -> TokenMeasures:
    """What the ids of a teacher tell: -1 with confidence 0 where a token has none."""
    if target.label_log_probs is not None:
        loss = target.label_log_probs.squeeze(-1).neg().to(measures.loss.dtype)
        measures = measures._replace(teacher_loss=torch.where(labels >= 0, loss, 0.0))
    if target.tail == "sample":
        return measures
    log_prob, slot = _used(target).max(-1)
    top = target.ids.gather(-1, slot[:, None]).squeeze(-1)
    top = top.masked_fill(log_prob == -torch.inf, -1)
    confidence = log_prob.exp() if target.temperature == 1 else None
    return measures._replace(teacher_top=top, teacher_confidence=confidence)


def _stored_confidence(target: Sparse, kind: str, labels: Tensor) -> Tensor:
    if kind == "label" and target.label_log_probs is not None:
        return target.label_log_probs.squeeze(-1).exp() * (labels >= 0)
    if kind == "top" and target.tail == "sample":
        raise ValueError(
            "ids that were drawn (tail 'sample') do not tell the most likely id's probability; "
            "ask for the label's"
        )
    target = target.unit or target
    if target.temperature != 1:
        raise ValueError(
            f"log_probs stored at temperature {target.temperature} do not tell how sure the "
            "teacher is at 1; store them at temperature 1, or ask for no confidence"
        )
    probs = _used(target).exp()
    if kind == "top":
        return probs.amax(-1)
    # Ids are used slots' only where they are not negative, and neither is a label that counts.
    matches = (target.ids == labels[..., None]) & (labels >= 0)[..., None]
    return (probs * matches).sum(-1)


def _measure_chunk(logits: LogitRows, shard: VocabShard, width: int) -> TokenMeasures:
    divergence = None if logits.y is None else _FORWARD_KL
    ranks = exchange(_local(logits, divergence, shard), shard)
    stats = merge(ranks, logits, divergence)
    confidence = known(stats.ce_lse).neg().exp()
    measures = TokenMeasures(known(stats.ce), _top(ranks, "x", width), confidence)
    if divergence is None:
        return measures
    y_lse = known(stats.y_lse)
    teacher_loss = known(stats.y_max) - ranks["y_label_logit"].amax(0) + y_lse
    return measures._replace(
        teacher_loss=torch.where(known(logits.labels) >= 0, teacher_loss, 0.0),
        teacher_top=_top(ranks, "y", width),
        kl=stats.divergence,
        teacher_confidence=y_lse.neg().exp(),
    )


def _local(
    logits: LogitRows, divergence: Divergence | None, shard: VocabShard
) -> dict[str, Tensor]:
    """``rows.all_statistics``, and for each model the column of its largest logit (exact in float32
    up to 2**24 columns)."""
    local = all_statistics(logits, divergence, shard, None)
    local["x_top"] = _top_column(logits.x, local["x_max"])
    if divergence is not None:
        y = known(logits.y)
        local["y_top"] = _top_column(y, local["y_max"])
        local["y_label_logit"] = label_logit(y, known(logits.labels), shard)
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
