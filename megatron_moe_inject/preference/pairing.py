"""Which answers of a step are of one pair, on whichever data-parallel ranks they are.

Shapes: n micro-batches, b samples each, d data-parallel ranks, p pairs of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_moe_inject.data.labels import PAIR_SAMPLE, HostGroup
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.step import Step


@dataclass(frozen=True)
class Pairing:
    """The pairs of a step.

    Attributes:
        pairs: p, those of all data-parallel ranks.
        samples: of this rank's answers in their order, the micro-batch and the place in it.
        places: of each of them, ``2 i`` in the i-th pair for the chosen and ``2 i + 1`` for the
            rejected answer.
        tokens: whose loss counts, those of all data-parallel ranks.
    """

    pairs: int
    samples: Sequence[tuple[int, int]]
    places: Sequence[int]
    tokens: int


def pairing(step: Step, source: HostGroup, data_parallel: dist.ProcessGroup | None) -> Pairing:
    """Find them.

    Args:
        step: with ``loss_mask``, which other samples may have.
        source: who reads data, for all model-parallel ranks.
        data_parallel: those ranks, over gloo; ``None`` for one.

    Collectives: one broadcast of n b int64 over the model-parallel ranks and one all-gather of
    n b + 1 over the data-parallel ones, on the host.

    Raises:
        RecipeError: on every rank: an answer whose other one is in another batch.
    """
    shape = step.labels.shape
    read = None
    if step.as_read is not None:
        read = torch.stack([_numbers(batch, shape[1]) for batch in step.as_read])
    numbers = source.broadcast_labels(read, *shape)
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
    mine = [(i, j) for i, j in (numbers >= 0).nonzero().tolist()]
    return Pairing(
        len(pairs),
        mine,
        [place[int(numbers[sample])] for sample in mine],
        sum(int(rank[-1]) for rank in ranks),
    )


def _numbers(batch: dict, samples: int) -> torch.Tensor:
    """``PAIR_SAMPLE`` of a micro-batch, ``[b]``; a batch of another's making has no pairs."""
    if PAIR_SAMPLE not in batch:
        return torch.full((samples,), -1)
    return torch.as_tensor(batch[PAIR_SAMPLE]).cpu().reshape(-1).long()
