"""The samples of a step as a teacher with another tokenizer reads them.

Shapes: n micro-batches, b samples each, k samples that are read, s sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from megatron_moe_inject.data.labels import samples_of
from megatron_moe_inject.data.packed import counted
from megatron_moe_inject.host.step import MicroBatch
from megatron_moe_inject.teachers.align.reading import Reader, Reading

Reads = Callable[[Sequence[MicroBatch], torch.Tensor, int, torch.Tensor | None], Reading]
"""Of micro-batches, ``[n, b]`` bool, s and ``starts`` as of ``SampleReader``."""


def counted_labels(
    batches: Sequence[MicroBatch], selected: torch.Tensor, length: int
) -> np.ndarray:
    """Labels of some samples whose loss counts, ``[k, s]`` bool; arguments as of
    ``SampleReader``."""
    masks = [counted(batch, (selected.shape[1], length)) for batch in batches]
    return on_host(samples_of(masks, selected.nonzero().tolist())).reshape(-1, length)


class SampleReader:
    """Reads samples of micro-batches.

    Args:
        reader: makes what the teacher reads of ids.
        end: the student's id of the end of a document, behind which another begins that is masked
            from it; None where documents are not masked from each other, or are packed.
    """

    def __init__(self, reader: Reader, end: int | None = None) -> None:
        self._reader = reader
        self._end = end

    def __call__(
        self,
        batches: Sequence[MicroBatch],
        selected: torch.Tensor,
        length: int,
        starts: torch.Tensor | None,
    ) -> Reading:
        """Read some samples.

        Args:
            batches: as they were read, on the host or not.
            selected: ``[n, b]`` bool, which of their samples; at least one.
            length: s.
            starts: ``[n, b, s]`` bool, where documents begin if they are packed.
        """
        places = selected.nonzero().tolist()
        tokens, labels = (
            on_host(samples_of([batch[name] for batch in batches], places)).reshape(-1, length)
            for name in ("tokens", "labels")
        )
        begins = None if starts is None else starts[selected].cpu().numpy()
        if begins is None and self._end is not None:
            begins = np.roll(tokens == self._end, 1, 1)
            begins[:, 0] = True
        mask = counted_labels(batches, selected, length)
        return self._reader.read(tokens, labels[:, -1], mask, begins)


def on_host(values: torch.Tensor | None) -> np.ndarray:
    """What ``samples_of`` gave of one sample or more."""
    assert values is not None, "samples are selected"
    return values.cpu().numpy()
