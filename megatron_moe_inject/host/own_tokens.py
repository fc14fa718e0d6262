"""Which tokens of a step a rank's layers see, and in what form.

Samples stand side by side in the states of ordinary layers. Packed with documents, a micro-batch is
one row: all tokens of its first sample, then those of the second. Layers see it as ``[t, 1]``. Only
MoE layers see ``[l, b']``, samples side by side again, where the script says how long they are
(``PackedSeqParams.tokens_per_sample``) and a rank's part of the row is as long as b' of them.

Shapes: n micro-batches, b samples each, s tokens of a sample, c context-parallel size, l this
rank's part of a sequence, t of a row: b s / c tokens, divided by the tensor-parallel size under
sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_moe_inject.host.context_parallel import context_parallel_slice
from megatron_moe_inject.host.megatron_types import Groups


class OwnTokens:
    """Which of a step's tokens this rank's layers see, and in what form.

    Args:
        groups: the student's ``ProcessGroupCollection``.
        sequence_parallel: whether hidden states are split over the tensor-parallel group.
        packed: whether a micro-batch is one row; a row of several samples takes c = 1.
    """

    def __init__(self, groups: Groups, *, sequence_parallel: bool, packed: bool) -> None:
        self._cp = (groups.cp.rank(), groups.cp.size())
        self._part = (groups.tp.rank(), groups.tp.size()) if sequence_parallel else (0, 1)
        self._packed = packed

    def of_rank(self, whole: torch.Tensor) -> torch.Tensor:
        """Of whole samples ``[n, b, s]`` this context-parallel rank's part, ``[n, b, s/c]``."""
        rows = context_parallel_slice(whole.flatten(0, 1).unsqueeze(2), *self._cp)
        return rows.view(*whole.shape[:2], -1)

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """Of a context-parallel rank's tokens ``[n, b, s/c]`` what its layers see, ``[n, l, b]``
        or, packed, ``[n, t, 1]``."""
        if self._packed:
            whole = whole.flatten(1, 2).unsqueeze(2)
        else:
            whole = whole.transpose(1, 2)
        rank, size = self._part
        return whole if size == 1 else whole.chunk(size, dim=1)[rank]

    def of_samples(self, values: torch.Tensor, length: int) -> torch.Tensor:
        """What is the same for all tokens of a sample, ``[n, b]``: ``[n, 1, b]`` or, packed,
        ``[n, t, 1]``, where ``length`` is s/c."""
        if not self._packed or values.shape[1] == 1:
            return values.unsqueeze(1)
        return self.of(values.unsqueeze(2).expand(-1, -1, length))

    @staticmethod
    def seen(own: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """A micro-batch's ``[l, b]``, ``[1, b]`` or ``[t, 1]`` as the layer sees it whose states
        are ``shape``, ``[l, b']``."""
        length, samples = shape
        if own.shape[1] != samples and len(own) > 1:
            own = own.view(samples, length).t()
        return own.expand(length, samples)

    @staticmethod
    def as_row(seen: torch.Tensor) -> torch.Tensor:
        """Of a row of packed samples what a layer sees, ``[l, b', ...]``, as ``[t, 1, ...]``."""
        return seen.transpose(0, 1).flatten(0, 1).unsqueeze(1)

    def samples_of_row(self, samples: int, tokens: int) -> torch.Tensor:
        """The sample of each of this rank's t = ``tokens`` in a row of b, ``[t]`` int64 on the
        host."""
        return self.places_of_row(samples, tokens)[0]

    def places_of_row(self, samples: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The sample of each of this rank's t = ``tokens`` in a row of b, and its position there,
        ``[t]`` int64 each on the host."""
        rank, size = self._part
        place, length = torch.arange(rank * tokens, (rank + 1) * tokens), tokens * size // samples
        return place // length, place % length
