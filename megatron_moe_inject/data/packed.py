"""Packed samples: several documents in a sample, and one row of tokens for a micro-batch.

Where documents are packed (``--dataloader-inter-document-masking``, ``--sft``), attention and
positions stop at their borders, which a batch names in ``cu_seqlens``, and Megatron flattens a
micro-batch of b samples to one row of b s tokens before it divides the row among context- and
tensor-parallel ranks. All documents of a sample come from one entry of the blend, so a sample has
one label. A loss that differs by sample is taken on segments of the row, each of one sample; layers
find a sample's tokens in it by ``host.own_tokens``.

Shapes: b samples of the micro-batch, s tokens of a sample, c context-parallel size, t = b s / c
tokens of this rank's part of the row.
"""

from __future__ import annotations

import itertools
import math
from argparse import Namespace

import torch

from megatron_moe_inject.host.errors import (
    RecipeError,
)
from megatron_moe_inject.host.step import MicroBatch

FLAGS = ("sft", "dataloader_inter_document_masking")


def packing_flag(args: Namespace) -> str | None:
    """The flag by which samples are packed; None where they are not."""
    name = next((name for name in FLAGS if getattr(args, name, None)), None)
    return None if name is None else f"--{name.replace('_', '-')}"


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


def counted(batch: MicroBatch, shape: tuple[int, ...]) -> torch.Tensor:
    """Tokens of a micro-batch that have a loss, ``[b, s]`` bool on the host; all without a mask."""
    if batch.get("loss_mask") is None:
        return torch.ones(shape, dtype=torch.bool)
    return (torch.as_tensor(batch["loss_mask"]).reshape(shape) != 0).cpu()


def starts(batch: MicroBatch, shape: tuple[int, ...]) -> torch.Tensor:
    """Where documents of a packed micro-batch begin, ``[b, s]`` bool on the host.

    ``cu_seqlens`` ``[b, m]`` has the borders of each sample, filled up with s; a first document
    that has none is the whole sample.
    """
    samples, length = shape
    borders = torch.as_tensor(batch["cu_seqlens"]).cpu().long().view(samples, -1)
    found = torch.zeros(samples, length + 1, dtype=torch.bool)
    found.scatter_(1, borders.clamp(max=length), True)
    found[:, 0] = True
    return found[:, :length]


def document_lengths(starts: torch.Tensor) -> list[list[int]]:
    """Lengths of the documents of each of k samples, of ``[k, s]`` as of ``starts``."""
    lengths = []
    for sample in starts:
        borders = [*sample.nonzero().flatten().tolist(), len(sample)]
        lengths.append([b - a for a, b in itertools.pairwise(borders)])
    return lengths


def check_packed(args: Namespace, micro_batch_size: int, part: str) -> None:
    """Refuse what follows samples where a row of several is divided among context-parallel ranks.

    Args:
        args: Megatron's arguments.
        micro_batch_size: the largest that is used.
        part: what does so, by its key or flag.

    Raises:
        RecipeError: names the flag and the part.
    """
    flag, size = packing_flag(args), getattr(args, "context_parallel_size", 1)
    if flag is not None and size > 1 and micro_batch_size > 1:
        raise RecipeError(
            f"{flag}: --context-parallel-size {size} divides the row of the {micro_batch_size} "
            f"samples of a micro-batch as a whole, where {part} does not tell them apart; set "
            f"--micro-batch-size (and --eval-micro-batch-size) to 1, or leave {part} out"
        )


def check_whole_documents(args: Namespace, part: str) -> None:
    """Refuse what divides sequences among context-parallel ranks where Megatron divides documents.

    Args:
        args: Megatron's arguments.
        part: what does so, by its key or flag.

    Raises:
        RecipeError: names the flags and the part.
    """
    size = getattr(args, "context_parallel_size", 1)
    if getattr(args, "sft", False) and size > 1:
        raise RecipeError(
            f"--sft: --context-parallel-size {size} divides each document by itself, and {part} "
            f"divides samples as a whole; set it to 1, or leave {part} out"
        )


def check_pipeline(args: Namespace, micro_batch_size: int) -> None:
    """Refuse rows of several samples where pipeline stages hand them on.

    Megatron's schedules receive ``[s, b, h]`` of what a stage sends as ``[b s, 1, h]``.

    Raises:
        RecipeError: names the flags.
    """
    flag, size = packing_flag(args), getattr(args, "pipeline_model_parallel_size", 1)
    if flag is not None and size > 1 and micro_batch_size > 1:
        raise RecipeError(
            f"{flag}: puts the {micro_batch_size} samples of a micro-batch in one row, which "
            f"Megatron's schedule for --pipeline-model-parallel-size {size} does not receive as "
            "one; set --micro-batch-size (and --eval-micro-batch-size) to 1"
        )
