"""A teacher with another tokenizer in a step: what it says of chunks of the samples' text.

The rank that reads the data turns the step's samples into what the teacher reads (``reading``), on
the host and before the schedule, and hands that on over gloo, so that no device waits for the host.
How likely the teacher finds it (``scores``) comes from its passes, which the ranks of the last
stage share, or from servers. No hidden states are kept, and nothing need come by windows.

Shapes: n micro-batches, b samples each, k samples of a step, s sequence, t tokens that the teacher
reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_moe_inject.host.step import MicroBatch
from megatron_moe_inject.host.to_device import to_device
from megatron_moe_inject.teachers.align.chunk_teacher import ChunkTeacher
from megatron_moe_inject.teachers.align.reading import Reading, nothing_read
from megatron_moe_inject.teachers.align.samples import Reads
from megatron_moe_inject.teachers.align.scores import Scores
from megatron_moe_inject.teachers.spread import MAX_SEQUENCES


class AlignedTeacher(ChunkTeacher):
    """``step_pass.StepTeacher`` by chunks of text that are read in the step.

    Args:
        name: its key in the recipe.
        reads: makes what it reads of samples, on ranks that read data.
        scores: says how likely it finds that.
        tp_group: tensor-parallel group of the last stage; its first rank reads the data.
        host_group: the same ranks over gloo; None for one rank alone.
        cp_group: context-parallel group.
        device: where the loss is computed.
    """

    def __init__(
        self,
        name: str,
        reads: Reads,
        scores: Scores,
        *,
        tp_group: dist.ProcessGroup,
        host_group: dist.ProcessGroup | None,
        cp_group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        super().__init__(name, cp_group, device)
        self._reads = reads
        self._scores = scores
        self._host_group = host_group
        self._source = dist.get_process_group_ranks(tp_group)[0]

    def begin(
        self,
        batches: Sequence[MicroBatch] | None,
        selected: torch.Tensor,
        sequence_length: int,
        *,
        bare: bool = False,
        starts: torch.Tensor | None = None,
    ) -> None:
        """Read the step's samples; see ``step_pass.StepTeacher``.

        Collectives: over ``host_group`` two broadcasts of what is read, none where nothing is
        selected; those of ``Scores``.
        """
        count = self._select(selected, sequence_length)
        reading = nothing_read(sequence_length)
        if count:
            own = None
            if batches is not None:
                own = self._reads(batches, selected, sequence_length, starts)
            reading = self._shared(own, (count, sequence_length))
        scores = self._scores(reading, MAX_SEQUENCES * sequence_length)
        if len(reading.lengths):
            self._keep(reading, scores)

    def _shared(self, reading: Reading | None, shape: tuple[int, int]) -> Reading:
        """What the reading rank has read, on all ranks of its group."""
        group = self._host_group
        if group is None:
            assert reading is not None, "a rank alone reads its data"
            return reading
        sizes = torch.zeros(2, dtype=torch.int64)
        if reading is not None:
            sizes = torch.tensor([len(reading.lengths), len(reading.inputs)])
        dist.broadcast(sizes, src=self._source, group=group)
        texts, tokens = sizes.tolist()
        whole = torch.empty(texts + 3 * tokens + shape[0] * shape[1], dtype=torch.int64)
        if reading is not None:
            parts = (getattr(reading, name).ravel() for name in _PARTS)
            whole = torch.from_numpy(np.concatenate([part.astype(np.int64) for part in parts]))
        dist.broadcast(whole, src=self._source, group=group)
        lengths, inputs, labels, numbers, places = whole.split(
            [texts, tokens, tokens, tokens, shape[0] * shape[1]]
        )
        return Reading(
            lengths.numpy(),
            inputs.int().numpy(),
            labels.int().numpy(),
            numbers.numpy(),
            places.int().numpy().reshape(shape),
        )

    def _keep(self, reading: Reading, scores: torch.Tensor) -> None:
        """Make chunks of the teacher's ``scores``; keep this rank's labels of them."""
        numbers = self._on_device(reading.numbers)
        places = self._on_device(reading.places).long()
        sums = scores.new_zeros(places.numel() + 1, dtype=torch.float64)
        sums.index_add_(0, numbers, scores.double())
        self._tell(places, sums[self._of_chunks(places)].float())

    def _on_device(self, values: np.ndarray) -> torch.Tensor:
        return to_device(torch.from_numpy(values), self._device)


_PARTS = ("lengths", "inputs", "labels", "numbers", "places")
