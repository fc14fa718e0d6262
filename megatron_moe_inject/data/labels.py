"""Domain labels: which domain each sample of a step belongs to, on every rank that needs it.

Megatron's ``BlendedDataset`` returns ``dataset_id`` with each sample when ``--data-path`` has
more than one entry. Only tensor-parallel rank 0 of the pipeline stages that read data sees it,
so once per step the source rank turns the ids of all micro-batches into domain indices and
broadcasts them over the model-parallel ranks. The broadcast runs over a gloo group: labels are
needed on the host (they decide shapes), and a device broadcast would cost a synchronisation. What
is true or false of every token, whether its loss counts and whether it begins a document, goes the
same way, a bit each, where a part of the step asks for it.

Shapes: n micro-batches of the step, b samples of a micro-batch, s sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_moe_inject.host.agreement import host_twin
from megatron_moe_inject.host.step import MicroBatch

DATASET_ID = "dataset_id"
"""Batch key set by ``megatron.core.datasets.blended_dataset.BlendedDataset``."""
TOKEN_PLACES = "token_places"
"""Batch key set by ``data.token_places`` where a run asks for it, ``[b, s]`` int64."""
ANSWERS = "answers"
"""Batch key set where data holds pairs of answers (``data.pairs``), ``[b, m]`` int64: of each
document of a sample, in their order, twice the number of the pair whose answer it is, which no
other pair of the step has, and 1 more for the rejected answer; -1 for all others. A sample that is
not packed is one document."""
_HIDDEN = (DATASET_ID, TOKEN_PLACES, ANSWERS)


def pull(iterator: Iterator[MicroBatch] | None, num_microbatches: int) -> list[MicroBatch] | None:
    """Take the step's micro-batches from one data iterator.

    ``next`` is called on the iterator that Megatron passed, so a ``RerunDataIterator`` records
    them and replays them on a rerun. ``None`` (a rank that reads no data) stays ``None``.
    """
    if iterator is None:
        return None
    return [next(iterator) for _ in range(num_microbatches)]


def for_stock_code(batches: list[MicroBatch] | None) -> list[MicroBatch] | None:
    """Copies without what is ours or what stock slicing under context parallelism cannot handle:
    ``dataset_id``, ``token_places`` and ``answers``.

    The originals stay as they are, because a rerun is given the same dictionaries again.
    """
    if batches is None:
        return None
    return [{k: v for k, v in batch.items() if k not in _HIDDEN} for batch in batches]


def samples_of(
    values: Sequence[torch.Tensor], places: Sequence[Sequence[int]]
) -> torch.Tensor | None:
    """Some samples of a step as one tensor, ``[k, ...]``, each copied once; None for none. It is
    pinned if they are, so that a device takes it without a wait.

    Args:
        values: of each micro-batch, ``[b, ...]``.
        places: k pairs of a micro-batch and the sample's place in it.
    """
    if not places:
        return None
    samples = [torch.as_tensor(values[batch])[sample] for batch, sample in places]
    first = samples[0]
    together = first.new_empty((len(samples), *first.shape), pin_memory=first.is_pinned())
    return torch.stack(samples, out=together)


def domains_of(
    batches: Sequence[MicroBatch], domain_of_entry: Sequence[int], micro_batch_size: int
) -> torch.Tensor:
    """Domain index of each sample of the step, ``[n, b]`` int64 on the host.

    Args:
        batches: the step's n micro-batches, still with ``dataset_id``.
        domain_of_entry: domain index, or ``GENERAL``, of each entry of the blend.
        micro_batch_size: b.

    A blend of one dataset carries no ``dataset_id``: all samples belong to entry 0.
    """
    labels = torch.empty(len(batches), micro_batch_size, dtype=torch.int64)
    entry_to_domain = torch.tensor(domain_of_entry, dtype=torch.int64)
    for row, batch in zip(labels, batches, strict=True):
        if DATASET_ID in batch:
            entries = torch.as_tensor(batch[DATASET_ID]).cpu().reshape(-1).long()
        else:
            assert len(domain_of_entry) == 1, (
                f"a blend of {len(domain_of_entry)} datasets gave a batch without {DATASET_ID!r}"
            )
            entries = torch.zeros(micro_batch_size, dtype=torch.int64)
        row.copy_(entry_to_domain[entries])
    return labels


@dataclass(frozen=True)
class HostGroup:
    """The model-parallel ranks (TP x PP) of one data- and context-parallel position, over gloo.

    Attributes:
        group: the gloo process group, ``None`` where one rank is the whole group.
        source: global rank that reads data for all of them: tensor rank 0 of the first stage.
    """

    group: dist.ProcessGroup | None
    source: int

    @classmethod
    def create(cls, model_parallel_group: dist.ProcessGroup) -> HostGroup:
        """Make the gloo twin of this rank's model-parallel group.

        Collectives: that of ``host_twin``.
        """
        ranks = dist.get_process_group_ranks(model_parallel_group)
        return cls(host_twin(model_parallel_group), min(ranks))

    def broadcast_labels(
        self, labels: torch.Tensor | None, num_microbatches: int, micro_batch_size: int
    ) -> torch.Tensor:
        """Give every rank of the group the step's labels, ``[n, b]`` int64.

        Args:
            labels: the labels on the source rank, ignored elsewhere.

        Collectives: one broadcast of n*b int64 over this group, none where it is one rank.
        """
        if self.group is None:
            assert labels is not None, "a single rank reads its own data"
            return labels
        if dist.get_rank() != self.source:
            labels = torch.empty(num_microbatches, micro_batch_size, dtype=torch.int64)
        assert labels is not None, "the source rank has read the step's labels"
        dist.broadcast(labels, src=self.source, group=self.group)
        return labels

    def broadcast_bits(self, bits: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
        """Give every rank of the group a bool tensor of that shape.

        Args:
            bits: it on the source rank, ignored elsewhere.

        Collectives: one broadcast of a bit per value over this group, none where it is one rank.
        """
        if self.group is None:
            assert bits is not None, "a single rank reads its own data"
            return bits
        size = math.prod(shape)
        packed = torch.empty(-(-size // 8), dtype=torch.uint8)
        if dist.get_rank() == self.source:
            assert bits is not None, "the source rank has read the step's tokens"
            packed = torch.from_numpy(np.packbits(bits.numpy()))
        dist.broadcast(packed, src=self.source, group=self.group)
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=size)).bool().view(shape)
