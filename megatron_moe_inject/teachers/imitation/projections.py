"""Projections from the student's width to teachers'.

They are trainable parameters of the model chunk that holds the student's layer, so they have
optimizer state and are in the checkpoint, under names of their own: plain Megatron, which does not
ask for them, loads the checkpoint without them and drops them when it saves.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_moe_inject.host.model_parts import (
    PROJECTIONS,
)
from megatron_moe_inject.teachers.imitation.terms import ImitationTerm


class Projections(torch.nn.ModuleDict):
    """Linear maps from the student's width to teachers', by ``ImitationTerm.projection``.

    The start is a function of the name and the seed alone, the same at every layout, and takes
    nothing from the student's random number generators.

    Args:
        terms: those of the layers of one model chunk.
        widths: teacher hidden size by teacher.
        hidden_size: the student's h.
        like: a parameter, for type and device.
        seed: any number; Megatron's ``--seed``.
        sequence_parallel: whether ranks see parts of the sequence, so that Megatron has to sum
            the gradients over the tensor-parallel group.
        tp_group: that group.
    """

    def __init__(
        self,
        terms: Sequence[ImitationTerm],
        widths: Mapping[str, int],
        *,
        hidden_size: int,
        like: torch.Tensor,
        seed: int,
        sequence_parallel: bool,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        self._tp_group = tp_group
        self.stored = True
        for term in terms:
            width = widths[term.teacher]
            if width == hidden_size or term.projection in self:
                continue
            generator = torch.Generator().manual_seed(seed + zlib.crc32(term.projection.encode()))
            start = torch.randn(width, hidden_size, generator=generator) * hidden_size**-0.5
            linear = torch.nn.Linear(hidden_size, width, bias=False, device="meta")
            weight: Any = torch.nn.Parameter(start.to(like))
            weight.sequence_parallel = sequence_parallel  # Megatron's mark
            linear.weight = weight
            self[term.projection] = linear
        self.register_load_state_dict_post_hook(_forgive_missing)

    def project(self, term: ImitationTerm, states: torch.Tensor) -> torch.Tensor:
        """``[..., h] -> [..., h_t]``; as they are where the widths agree."""
        if term.projection not in self:
            return states
        linear = self[term.projection]
        assert isinstance(linear, torch.nn.Linear)
        return linear(states.to(linear.weight.dtype))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """For ``dist_checkpointing``; empty unless ``stored``, so that a checkpoint without
        projections can be loaded."""
        from megatron.core.transformer.utils import sharded_state_dict_default

        state: dict[str, Any] = {}
        for name, linear in self.items() if self.stored else ():
            state |= sharded_state_dict_default(
                linear, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self._tp_group
            )
        return state


def _forgive_missing(projections: Projections, incompatible: Any) -> None:
    """Not an error: what was not asked of the checkpoint."""
    if not projections.stored:
        keys = [key for key in incompatible.missing_keys if f"{PROJECTIONS}." in key]
        for key in keys:
            incompatible.missing_keys.remove(key)
