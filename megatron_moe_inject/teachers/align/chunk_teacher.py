"""What chunks of text a teacher tells of in a step, wherever it is from: a model, servers, a store.

They differ in how the log-probabilities of a step's chunks get to this rank. What the loss,
measures and confidences then ask of them is the same, and stands here. What is kept until the step
ends is three numbers for each token.

Shapes: n micro-batches, b samples each, k samples of a micro-batch or a step, s sequence, c
context-parallel size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import torch.distributed as dist

from megatron_moe_inject.host.context_parallel import context_parallel_slice
from megatron_moe_inject.host.indices import index
from megatron_moe_inject.losses.target import Aligned, Target


class ChunkTeacher:
    """What ``step_pass.StepTeacher`` asks that does not depend on where the chunks are from.

    Args:
        name: its key in the recipe.
        cp_group: context-parallel group.
        device: where the loss is computed.
    """

    unknown: torch.Tensor | None = None
    ran_bare = False
    windowed = False
    tp_group: dist.ProcessGroup | None = None

    def __init__(self, name: str, cp_group: dist.ProcessGroup, device: torch.device) -> None:
        self.name = name
        self._cp_group = cp_group if cp_group.size() > 1 else None
        self._cp = (cp_group.rank(), cp_group.size())
        self._device = device

    def _select(self, selected: torch.Tensor, sequence_length: int) -> int:
        """Remember ``[n, b]`` which samples of the step it teaches, nothing told of any yet; how
        many."""
        self._length, self._selected = sequence_length, selected
        self._rows = selected.sum(dim=1).tolist()
        count = sum(self._rows)
        self._places = torch.full((count, sequence_length // self._cp[1]), -1, device=self._device)
        self._log_probs = torch.zeros(self._places.shape, device=self._device)
        self._labels = torch.ones_like(self._log_probs)
        return count

    def _of_chunks(self, places: torch.Tensor) -> torch.Tensor:
        """Of ``[k, s]`` places as of ``Reading.places`` the number of each label's chunk in the
        step, k s for none."""
        first = torch.arange(len(places), device=self._device)[:, None] * self._length
        return torch.where(places >= 0, first + places, places.numel())

    def _tell(self, places: torch.Tensor, log_probs: torch.Tensor) -> None:
        """Keep this rank's part of what is told.

        Args:
            places: ``[k, s]`` int64, at each label the place of its chunk's first one; -1 for none.
            log_probs: ``[k, s]`` float32, of its chunk.
        """
        of_chunk = self._of_chunks(places)
        labels = log_probs.new_zeros(places.numel() + 1)
        labels.index_add_(0, of_chunk.flatten(), torch.ones_like(log_probs).flatten())
        self._places, self._log_probs, self._labels = (
            context_parallel_slice(whole.unsqueeze(-1), *self._cp).squeeze(-1)
            for whole in (places, log_probs, labels[of_chunk])
        )

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
    def passes(self) -> tuple[Self, ...]:
        """Itself: a domain's teachers."""
        return (self,)

    def together(self, targets: Sequence[Target]) -> Target:
        """What the domain's teachers say as one: that of the only teacher."""
        (target,) = targets
        return target
