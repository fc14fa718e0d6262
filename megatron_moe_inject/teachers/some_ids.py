"""A teacher in a step of which some ids of each token are known, whoever told them.

A store (``store``) and a server (``served``) differ in how a step's samples get to this rank. What
the loss, measures and confidences then ask of them is the same, and stands here.

Shapes: n micro-batches, b samples each, k samples of a micro-batch or a step, s sequence, c
context-parallel size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

import torch
import torch.distributed as dist

from megatron_moe_inject.host.context_parallel import context_parallel_slice
from megatron_moe_inject.host.indices import index
from megatron_moe_inject.host.to_device import to_device
from megatron_moe_inject.losses.target import Target


class SomeIdsTeacher(ABC):
    """What ``step_pass.StepTeacher`` asks that does not depend on where the ids come from.

    Args:
        name: its key in the recipe.
        cp_group: context-parallel group.
        device: where the loss is computed.
    """

    unknown: torch.Tensor | None = None
    ran_bare = False
    windowed = False

    _tokens: torch.Tensor
    """[k, s] ids of the step's samples that it teaches."""

    def __init__(self, name: str, cp_group: dist.ProcessGroup, device: torch.device) -> None:
        self.name = name
        self._cp = (cp_group.rank(), cp_group.size())
        self._device = device

    def _select(self, selected: torch.Tensor) -> int:
        """Remember ``[n, b]`` which samples of the step it teaches; how many."""
        self._selected, self._rows = selected, selected.sum(dim=1).tolist()
        return sum(self._rows)

    @property
    def tp_group(self) -> dist.ProcessGroup | None:
        """Over whose ranks its head is sharded; None where it has none."""
        return None

    @abstractmethod
    def _at_one(self, rows: slice | torch.Tensor) -> Target:
        """What it says of some of the step's samples at temperature 1."""

    @abstractmethod
    def _readable(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Where it says something of them, ``[k, s/c]`` bool."""

    def _of(self, micro_batch: int) -> slice:
        begin = sum(self._rows[:micro_batch])
        return slice(begin, begin + self._rows[micro_batch])

    def bare_target(self, micro_batch: int) -> Target:
        """Never asked: there is no prefix to leave out."""
        raise AssertionError("what it says was said with or without a prefix")

    def readable(self, micro_batch: int) -> torch.Tensor | None:
        """Where it says something, ``[k, s/c]``."""
        return self._readable(self._of(micro_batch))

    def of_step(self, wanted: torch.Tensor) -> tuple[torch.Tensor, Target]:
        """Tokens ``[k, s]``, and what it says about them at temperature 1, of some samples."""
        rows = self._wanted(wanted)
        return self._tokens[rows], self._at_one(rows)

    def readable_of_step(self, wanted: torch.Tensor) -> torch.Tensor | None:
        """``readable`` of the samples of ``of_step``."""
        return self._readable(self._wanted(wanted))

    def _wanted(self, wanted: torch.Tensor) -> torch.Tensor:
        samples = wanted[self._selected].nonzero().flatten().tolist()
        return index(samples, self._device)

    def next_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """The next token of each position of ``[k, s]``, -1 at the last; this rank's, flat."""
        labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -1)], dim=1)
        return context_parallel_slice(labels.unsqueeze(-1), *self._cp).flatten()

    @property
    def passes(self) -> tuple[Self, ...]:
        """Itself: a domain's teachers."""
        return (self,)

    def together(self, targets: Sequence[Target]) -> Target:
        """What the domain's teachers say as one: that of the only teacher."""
        (target,) = targets
        return target


def handed_on(
    found: Mapping[str, torch.Tensor] | None,
    kinds: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    group: dist.ProcessGroup,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """What the first rank of a group has found, on the device of all of its ranks.

    Args:
        found: on the host; ``None`` on other ranks, or where nothing is selected.
        kinds: shape and type of each.

    Collectives: over the group a broadcast of each; none of one rank, or of nothing.
    """
    if found is None:
        found = {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in kinds.items()
        }
    first, handed = dist.get_process_group_ranks(group)[0], {}
    for name, value in found.items():
        shape = kinds[name][0]
        on_device = to_device(value, device).view(shape)
        if group.size() > 1 and shape[0]:
            dist.broadcast(on_device, src=first, group=group)
        handed[name] = on_device
    return handed
