"""A frozen head of which some rows have values of their own, or with a correction of low rank.

Shapes: t tokens, h hidden, v vocabulary, p tensor-parallel size, k rows of this rank with values of
their own, r rank of a correction, c columns of this rank that hold real ids.

    logits = (frozen head, but for its k rows that of ``values``) @ hidden + scale * B (A hidden)

The frozen head stays as it is, and no second one is made: its product is formed as ever, and the k
columns are written over by a product of their own. So all that reads logits knows nothing of this.
The gradient by the logits is taken apart likewise (``taken_columns``, ``low_rank_gradient``): what
trains costs products of k columns, or of r, beside those of a frozen head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from megatron_moe_inject.losses.products import (
    aligned,
    head_logits,
    hidden_gradient,
    pieces,
    whole,
    with_spare,
)
from megatron_moe_inject.losses.spec import VocabShard


@dataclass(frozen=True)
class HeadRows:
    """Rows of a head that have values of their own.

    Attributes:
        columns: [k] int64, which of this rank's v/p rows they are, counted from 0, rising, each
            once. A padded row among them takes no part: its values get a gradient of 0. One that
            this rank has not ends in torch's error of an index. k may be 0, and another number on
            each rank.
        values: [k, h] of the head's dtype, what stands in their place; may train.

    Raises:
        ValueError: shapes or a dtype that do not fit, with the values.
    """

    columns: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        columns, values = self.columns, self.values
        if columns.dim() != 1 or values.dim() != 2 or len(columns) != len(values):
            raise ValueError(
                f"columns {tuple(columns.shape)} and values {tuple(values.shape)} of a head's rows "
                "must be [k] and [k, h]"
            )
        if columns.dtype != torch.int64:
            raise ValueError(f"columns of a head's rows are {columns.dtype}; give int64")

    @classmethod
    def given(cls, source: Callable[[], tuple[Tensor, Tensor] | None] | None) -> Self | None:
        """What ``source`` gives, columns and values; None where it gives None or is None."""
        found = None if source is None else source()
        return None if found is None else cls(*found)

    def places(self, shard: VocabShard, width: int) -> Tensor:
        """``columns``, with that behind the last real id for each padded one, -1 for no row.

        Args:
            shard: this rank's part of the vocabulary.
            width: v/p, its rows with padding.
        """
        places = self.columns.clamp(max=shard.columns)
        return places.masked_fill_(self.columns >= width, -1)


@dataclass(frozen=True)
class LowRankHead:
    """What is added to a head: ``scale * b @ a``.

    Attributes:
        a: [r, h], the same on all of the vocabulary's ``tp_group``; may train.
        b: [v/p, r], this rank's rows, of one dtype with the head and ``a``; may train.
        scale: a number.

    Raises:
        ValueError: shapes or dtypes that do not fit, with the values.
    """

    a: Tensor
    b: Tensor
    scale: float

    def __post_init__(self) -> None:
        a, b = self.a, self.b
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.dtype != b.dtype:
            raise ValueError(
                f"a {tuple(a.shape)} {a.dtype} and b {tuple(b.shape)} {b.dtype} of a head's "
                "correction must be [r, h] and [v/p, r] of one dtype"
            )

    @classmethod
    def given(cls, source: Callable[[], tuple[Tensor, Tensor, float] | None] | None) -> Self | None:
        """What ``source`` gives, a, b and scale; None where it gives None or is None."""
        found = None if source is None else source()
        return None if found is None else cls(*found)


def student_logits(
    hidden: Tensor, head: Tensor, rows: HeadRows | None, low_rank: LowRankHead | None
) -> Tensor:
    """Logits of a head with all that changes it, [t, c]; no gradients.

    Args:
        hidden: [t, h].
        head: [c, h], the rows of real ids.
        rows: with ``places`` for columns.
        low_rank: as the student has it.

    As of ``head_logits``; with ``rows`` there is a column behind the last that nobody reads.
    """
    logits = head_logits(hidden, head, spare=rows is not None)
    if rows is not None:
        with_spare(logits).index_copy_(1, rows.columns, head_logits(hidden, rows.values))
    if low_rank is not None:
        narrow = hidden @ low_rank.a.t()
        for part in pieces(len(head), max(whole(len(head), hidden.dtype), 1), hidden.dtype):
            logits[:, part].addmm_(narrow, low_rank.b[part].t(), alpha=low_rank.scale)
    return logits


def taken_columns(gradient: Tensor, places: Tensor, out: Tensor | None = None) -> Tensor:
    """Take the gradient of rows with values of their own out of that of all.

    Args:
        gradient: [t, c] by logits that ``student_logits`` gave, and in their memory; 0 in these
            columns afterwards, so that ``gradient @ head`` is right without the head's own rows.
        places: [k], see ``HeadRows.places``.
        out: [t, k] to write to; None for new memory.

    Returns:
        [t, k] by the rows' logits, 0 for padded ones.
    """
    wide = with_spare(gradient)
    wide[:, -1].zero_()
    if out is None:
        out = aligned(gradient, len(gradient), len(places))
    torch.index_select(wide, 1, places, out=out)
    wide.index_fill_(1, places, 0)
    return out


def low_rank_gradient(gradient: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``scale * gradient @ b``, [t, r] in the dtype of ``gradient``: by ``a @ hidden``.

    ``gradient`` is [t, c], ``b`` has c rows or more, and ``dtype`` is that of the maths. It is this
    rank's part: the whole is the sum over ``tp_group``.
    """
    out = torch.empty(len(gradient), b.shape[1], dtype=dtype, device=b.device)
    hidden_gradient(gradient, b[: gradient.shape[1]], out)
    return out.mul_(scale).to(gradient.dtype)
