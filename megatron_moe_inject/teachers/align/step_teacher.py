"""A teacher with another tokenizer in a step: what it says of chunks of the samples' text.

The rank that reads the data turns the step's samples into what the teacher reads (``reading``), on
the host and before the schedule, and hands that on over gloo, so that no device waits for the host.
The ranks of the last stage share the teacher's passes over it. What is kept until the step ends is
three numbers for each token, no hidden states; nothing need come by windows.

Shapes: n micro-batches, b samples each, k samples of a micro-batch or a step, s sequence, c
context-parallel size, t tokens that the teacher reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_moe_inject.data.labels import samples_of
from megatron_moe_inject.data.packed import counted
from megatron_moe_inject.host.context_parallel import context_parallel_slice
from megatron_moe_inject.host.indices import index
from megatron_moe_inject.host.step import MicroBatch
from megatron_moe_inject.losses.target import Aligned, Target
from megatron_moe_inject.teachers.align.reading import Reader, Reading
from megatron_moe_inject.teachers.align.scores import Scores
from megatron_moe_inject.teachers.spread import MAX_SEQUENCES


class AlignedTeacher:
    """``step_pass.StepTeacher`` by chunks of text.

    Args:
        name: its key in the recipe.
        reader: makes what it reads of samples.
        scores: says how likely it finds that.
        tp_group: tensor-parallel group of the last stage; its first rank reads the data.
        host_group: the same ranks over gloo; None for one rank alone.
        cp_group: context-parallel group.
        device: where the loss is computed.
        end: the student's id of the end of a document, behind which another begins that is masked
            from it; None where documents are not masked from each other, or are packed.
    """

    unknown: torch.Tensor | None = None
    ran_bare = False
    windowed = False
    tp_group: dist.ProcessGroup | None = None

    def __init__(
        self,
        name: str,
        reader: Reader,
        scores: Scores,
        *,
        tp_group: dist.ProcessGroup,
        host_group: dist.ProcessGroup | None,
        cp_group: dist.ProcessGroup,
        device: torch.device,
        end: int | None = None,
    ) -> None:
        self.name = name
        self._reader = reader
        self._scores = scores
        self._host_group = host_group
        self._source = dist.get_process_group_ranks(tp_group)[0]
        self._cp_group = cp_group if cp_group.size() > 1 else None
        self._cp = (cp_group.rank(), cp_group.size())
        self._device = device
        self._end = end

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

        Collectives: over ``host_group`` two broadcasts of what is read; those of ``Scores``. None
        where nothing is selected.
        """
        self._length, self._selected = sequence_length, selected
        self._rows = selected.sum(dim=1).tolist()
        count = int(selected.sum())
        self._places = torch.full((count, sequence_length // self._cp[1]), -1, device=self._device)
        self._log_probs = torch.zeros(self._places.shape, device=self._device)
        self._labels = torch.ones_like(self._log_probs)
        if not count:
            return
        reading = None
        if batches is not None:
            reading = self._read(batches, selected, None if starts is None else starts[selected])
        reading = self._shared(reading, (count, sequence_length))
        if len(reading.lengths):
            self._keep(reading)

    def _read(
        self, batches: Sequence[MicroBatch], selected: torch.Tensor, starts: torch.Tensor | None
    ) -> Reading:
        places = selected.nonzero().tolist()
        shape = (int(selected.sum()), self._length)
        tokens, labels = (
            _on_host(samples_of([batch[name] for batch in batches], places)).reshape(shape)
            for name in ("tokens", "labels")
        )
        masks = [counted(batch, (selected.shape[1], self._length)) for batch in batches]
        mask = _on_host(samples_of(masks, places)).reshape(shape)
        if starts is None and self._end is not None:
            starts = torch.from_numpy(tokens == self._end).roll(1, 1)
            starts[:, 0] = True
        return self._reader.read(
            tokens, labels[:, -1], mask, None if starts is None else starts.numpy()
        )

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

    def _keep(self, reading: Reading) -> None:
        """Let the teacher say how likely the chunks are; keep this rank's labels of them."""
        scores = self._scores(reading, MAX_SEQUENCES * self._length)
        nowhere = reading.places.size
        numbers = self._on_device(reading.numbers)
        places = self._on_device(reading.places).long()
        sums = scores.new_zeros(nowhere + 1, dtype=torch.float64)
        sums.index_add_(0, numbers, scores.double())
        first = torch.arange(len(places), device=self._device)[:, None] * self._length
        of_chunk = torch.where(places >= 0, first + places, nowhere)
        labels = torch.zeros_like(sums, dtype=torch.float32)
        labels.index_add_(0, of_chunk.flatten(), torch.ones_like(of_chunk.flatten()).float())
        self._places, self._log_probs, self._labels = (
            context_parallel_slice(whole.unsqueeze(-1), *self._cp).squeeze(-1)
            for whole in (places, sums[of_chunk].float(), labels[of_chunk])
        )

    def _on_device(self, values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def _aligned(self, rows: slice | torch.Tensor) -> Aligned:
        places = self._places[rows]
        first = torch.arange(len(places), device=places.device)[:, None] * self._length
        return Aligned(
            torch.where(places >= 0, first + places, -1),
            self._log_probs[rows],
            self._labels[rows],
            len(places) * self._length,
            self._cp_group,
        )

    def _of(self, micro_batch: int) -> slice:
        begin = sum(self._rows[:micro_batch])
        return slice(begin, begin + self._rows[micro_batch])

    def _wanted(self, wanted: torch.Tensor) -> torch.Tensor:
        samples = wanted[self._selected].nonzero().flatten().tolist()
        return index(samples, self._device)

    def target(self, micro_batch: int) -> Target:
        """What it says about a micro-batch's k selected samples, ``[k, s/c]``."""
        return self._aligned(self._of(micro_batch))

    def bare_target(self, micro_batch: int) -> Target:
        """Never asked: it reads texts with its prefix alone."""
        raise AssertionError("ran_bare is False")

    def readable(self, micro_batch: int) -> torch.Tensor | None:
        """Labels that belong to a chunk, ``[k, s/c]``."""
        return self._places[self._of(micro_batch)] >= 0

    def of_step(self, wanted: torch.Tensor) -> tuple[torch.Tensor, Target]:
        """Places ``[k, s/c]`` for ``next_tokens``, and what it says of some samples."""
        rows = self._wanted(wanted)
        return self._places[rows], self._aligned(rows)

    def readable_of_step(self, wanted: torch.Tensor) -> torch.Tensor | None:
        """``readable`` of the samples of ``of_step``."""
        return self._places[self._wanted(wanted)] >= 0

    def next_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of what ``of_step`` gave, this rank's labels, flat: what is asked of chunks needs none
        of their ids, so that one that is there is 0 and another -1."""
        return tokens.clamp(max=0).flatten()

    @property
    def passes(self) -> tuple[AlignedTeacher, ...]:
        """Itself: a domain's teachers."""
        return (self,)

    def together(self, targets: Sequence[Target]) -> Target:
        """What the domain's teachers say as one: that of the only teacher."""
        (target,) = targets
        return target


_PARTS = ("lengths", "inputs", "labels", "numbers", "places")


def _on_host(values: torch.Tensor | None) -> np.ndarray:
    assert values is not None, "samples are selected"
    return values.cpu().numpy()
