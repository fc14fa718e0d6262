"""Which answers of a step are of one pair, on whichever data-parallel ranks they are.

Shapes: n micro-batches, b samples each, m documents of a sample, p pairs of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_moe_inject.data.labels import ANSWERS, HostGroup
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.step import Step


@dataclass(frozen=True)
class Pairing:
    """The pairs of a step.

    Attributes:
        pairs: p, those of all data-parallel ranks.
        places: of each of this rank's a answers in their order, ``2 i`` in the i-th pair for the
            chosen and ``2 i + 1`` for the rejected one.
        rows: ``[n, b, m]``, of each document which of these answers it is, -1 for none.
        tokens: whose loss counts, those of all data-parallel ranks.
    """

    pairs: int
    places: Sequence[int]
    rows: torch.Tensor
    tokens: int


def numbers_of(step: Step, source: HostGroup, documents: int) -> torch.Tensor:
    """``data.labels.ANSWERS`` of a step, ``[n, b, m]``, on every rank.

    Args:
        source: who reads data, for all model-parallel ranks.
        documents: m.

    Collectives: one broadcast of n b m int64 over the model-parallel ranks, on the host.
    """
    shape = step.labels.shape
    read = None
    if step.as_read is not None:
        read = torch.stack([_numbers(batch, shape[1], documents) for batch in step.as_read])
        read = read.flatten(1)
    return source.broadcast_labels(read, shape[0], shape[1] * documents).view(*shape, documents)


def pairing(
    step: Step, source: HostGroup, data_parallel: dist.ProcessGroup | None, documents: int
) -> Pairing:
    """Find them.

    Args:
        step: with ``loss_mask``, which other samples may have.
        source: who reads data, for all model-parallel ranks.
        data_parallel: those ranks, over gloo; ``None`` for one.
        documents: m.

    Collectives: that of ``numbers_of`` and one all-gather of n b m + 1 int64 over the data-parallel
    ranks, on the host.

    Raises:
        RecipeError: on every rank: an answer whose other one is in another batch.
    """
    numbers = numbers_of(step, source, documents)
    mask = step.loss_mask
    count = step.labels.numel() * step.sequence_length if mask is None else int(mask.sum())
    own = torch.cat([numbers.flatten(), torch.tensor([count])])
    ranks = [own]
    if data_parallel is not None:
        ranks = [torch.empty_like(own) for _ in range(data_parallel.size())]
        dist.all_gather(ranks, own, group=data_parallel)
    all_numbers = sorted(x for rank in ranks for x in rank[:-1].tolist() if x >= 0)
    pairs = [(a, b) for a, b in zip(all_numbers[::2], all_numbers[1::2], strict=False)]
    whole = len(all_numbers) == 2 * len(pairs)
    if not whole or any(a % 2 or b != a + 1 for a, b in pairs):
        raise RecipeError(
            "objective.preference: a batch holds an answer without the other one of its pair, as "
            "samples do not come in the order in which they were laid out; use Megatron's own data "
            "loader (--dataloader-type single)",
            "objective.preference",
        )
    place = {number: at for at, number in enumerate(all_numbers)}
    answers = numbers >= 0
    rows = torch.full_like(numbers, -1)
    rows[answers] = torch.arange(int(answers.sum()))
    return Pairing(
        len(pairs),
        [place[number] for number in numbers[answers].tolist()],
        rows,
        sum(int(rank[-1]) for rank in ranks),
    )


def _numbers(batch: dict, samples: int, documents: int) -> torch.Tensor:
    """``ANSWERS`` of a micro-batch, ``[b, m]``; a batch of another's making has no pairs."""
    if ANSWERS not in batch:
        return torch.full((samples, documents), -1)
    return torch.as_tensor(batch[ANSWERS]).cpu().view(samples, documents).long()
