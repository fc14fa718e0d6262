"""What a loss is told of the student: hidden states, head, labels, and the vocabulary they share.

Shapes: t tokens, h hidden, v vocabulary, p tensor-parallel size. Where a tensor is [t, ...] here,
any leading dimensions do, such as positions and samples; losses say which they take.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_moe_inject.losses.head_rows import HeadRows, LowRankHead
from megatron_moe_inject.losses.spec import LogitTransform, VocabShard


@dataclass(frozen=True)
class Vocabulary:
    """How the columns of logits are divided among ranks, and which of them are real ids.

    Attributes:
        tp_group: the group over whose ranks heads and logits are sharded, equally and in rank
            order; None for what is not sharded.
        valid_size: global ids from here on are padding: no probability for anybody and a gradient
            of 0. None where there is no padding.
    """

    tp_group: ProcessGroup | None = None
    valid_size: int | None = None

    def shard(self, width: int) -> VocabShard:
        """This rank's columns where every rank holds ``width`` of them, v/p.

        Raises ValueError for a ``valid_size`` that the shards cannot hold.
        """
        return VocabShard.of(width, self.tp_group, self.valid_size)


WHOLE = Vocabulary()


@dataclass(frozen=True)
class Student:
    """What the student says about tokens, and what it should have said.

    Attributes:
        hidden: [t, h], what its head reads; the same on all of the vocabulary's ``tp_group``.
        head: [v/p, h], this rank's rows of its head, same dtype.
        labels: [t] int64 global ids; a negative label has no cross-entropy. A label that is padding
            or beyond the vocabulary gives a cross-entropy of +inf.
        vocabulary: how it is sharded.
        transform: what makes logits of ``hidden @ head.T``; None for nothing.
        head_rows: values in the place of some rows of ``head``, which then is frozen; None for
            none.
        head_low_rank: what is added to all rows, also to those of ``head_rows``; None for nothing.

    Raises:
        ValueError: shapes or dtypes that do not fit, with the values; ``head_rows`` of a head that
            trains itself.
    """

    hidden: Tensor
    head: Tensor
    labels: Tensor
    vocabulary: Vocabulary = WHOLE
    transform: LogitTransform | None = None
    head_rows: HeadRows | None = None
    head_low_rank: LowRankHead | None = None

    def __post_init__(self) -> None:
        hidden, head, labels = self.hidden, self.head, self.labels
        if hidden.dim() < 2 or head.dim() != 2 or hidden.shape[-1] != head.shape[1]:
            raise ValueError(
                f"student's hidden {tuple(hidden.shape)} and head {tuple(head.shape)} must be "
                "[t, h] and [v/p, h]"
            )
        if hidden.dtype != head.dtype:
            raise ValueError(
                f"student's hidden is {hidden.dtype} and its head {head.dtype}; use one dtype"
            )
        if labels.shape != hidden.shape[:-1]:
            raise ValueError(
                f"labels {tuple(labels.shape)} must be those of the tokens "
                f"{tuple(hidden.shape[:-1])} of the student's hidden {tuple(hidden.shape)}"
            )
        if self.head_rows is not None:
            self._check_rows(self.head_rows)
        if self.head_low_rank is not None:
            self._check_low_rank(self.head_low_rank)

    def _check_rows(self, rows: HeadRows) -> None:
        head, values = self.head, rows.values
        if values.shape[1] != head.shape[1] or len(values) > len(head):
            raise ValueError(
                f"values {tuple(values.shape)} of rows of a head {tuple(head.shape)} must be "
                f"[k, h] with h={head.shape[1]} and at most {len(head)} rows"
            )
        if values.dtype != head.dtype:
            raise ValueError(
                f"values of a head's rows are {values.dtype} and the head {head.dtype}; use one "
                "dtype"
            )
        if head.requires_grad:
            raise ValueError(
                "a head that trains as a whole has no rows that train apart; freeze it, or leave "
                "head_rows out"
            )

    def _check_low_rank(self, change: LowRankHead) -> None:
        head, a, b = self.head, change.a, change.b
        if a.shape[1] != head.shape[1] or len(b) != len(head) or a.dtype != head.dtype:
            raise ValueError(
                f"a {tuple(a.shape)} and b {tuple(b.shape)} of the correction, {a.dtype}, must be "
                f"[r, h] and [v/p, r] of the head's {tuple(head.shape)} {head.dtype}"
            )

    @property
    def shard(self) -> VocabShard:
        """The vocabulary ids of this rank's rows of the head."""
        return self.vocabulary.shard(len(self.head))

    @property
    def head_trains(self) -> bool:
        """Whether the head, values of its rows or its correction require a gradient."""
        tensors = [self.head]
        if self.head_rows is not None:
            tensors.append(self.head_rows.values)
        if self.head_low_rank is not None:
            tensors += [self.head_low_rank.a, self.head_low_rank.b]
        return any(tensor.requires_grad for tensor in tensors)

    @property
    def placed_rows(self) -> HeadRows | None:
        """``head_rows`` with ``HeadRows.places`` for its columns."""
        if self.head_rows is None:
            return None
        places = self.head_rows.places(self.shard, len(self.head))
        return HeadRows(places, self.head_rows.values)
