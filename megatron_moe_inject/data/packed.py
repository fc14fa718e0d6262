"""Packed samples: one row of tokens for a whole micro-batch.

Where documents are packed (``--dataloader-inter-document-masking``, ``--sft``), Megatron flattens a
micro-batch of b samples to one row of b s tokens before it divides the row among context-parallel
ranks. A loss that differs by sample is taken on segments of the row, each of one sample.

Shapes: b samples of the micro-batch, s tokens of a sample, c context-parallel size, t = b s / c
tokens of this rank's part of the row.
"""

from __future__ import annotations

import math
from argparse import Namespace

from megatron_moe_inject.host.errors import (
    RecipeError,
)

FLAGS = ("sft", "dataloader_inter_document_masking")


def segments(
    samples: int, tokens: int, cp_size: int, cp_rank: int, *, by_document: bool
) -> list[int]:
    """The sample of each of k segments of equal length that a rank's part of a row consists of.

    Args:
        samples: b.
        tokens: t.
        by_document: each document was divided among the ranks (``--sft``), not the row as a whole
            (inter-document masking), of which a rank has a piece from the front and one from the
            back.
    """
    if cp_size == 1 or by_document:
        return list(range(samples))
    piece, sample = tokens // 2, tokens * cp_size // samples
    length = math.gcd(piece, sample)
    starts = (cp_rank * piece, (2 * cp_size - 1 - cp_rank) * piece)
    return [at // sample for start in starts for at in range(start, start + piece, length)]


def check_packed(args: Namespace, micro_batch_size: int, part: str) -> None:
    """Refuse what follows samples through the layers where a row has several.

    Args:
        args: Megatron's arguments.
        micro_batch_size: the largest that is used.
        part: what does so, by its key or flag.

    Raises:
        RecipeError: names the flag and the part.
    """
    flag = next((name for name in FLAGS if getattr(args, name, None)), None)
    if flag is not None and micro_batch_size > 1:
        raise RecipeError(
            f"--{flag.replace('_', '-')}: puts the {micro_batch_size} samples of a micro-batch in "
            f"one row, where {part} does not tell them apart; set --micro-batch-size (and "
            f"--eval-micro-batch-size) to 1, or leave {part} out"
        )
