"""L2 to the start: what trains is pulled back to where it began.

weight / 2 * |p - p0|^2 over all parameters that train, each counted once (L2-SP, 1802.01483). Its
gradient, weight * (p - p0), is added to the gradients once per step, after the backward passes of
all micro-batches and after Megatron has reduced and averaged them, so that it depends on no layout
and on no number of micro-batches; gradient norm and clipping include it, and Adam scales it like
any gradient. Where the optimizer keeps float32 values beside 16-bit parameters, these are what is
compared, since a parameter may move for long before its 16 bits do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_moe_inject.host import compat
from megatron_moe_inject.host.attached_loss import (
    add_reports,
    loss_scale,
    sum_and_count,
)
from megatron_moe_inject.host.megatron_types import Chunk, Groups, Optimizer
from megatron_moe_inject.host.model_parts import (
    counts_here,
)
from megatron_moe_inject.retention.originals import OriginalParameters

REPORTED = "l2 to start"


class _Held(NamedTuple):
    """A parameter that trains.

    Attributes:
        parameter: in Megatron's DDP, which gives it a ``main_grad`` that torch's types do not know.
        part: of the flat parameter, what this rank's optimizer steps.
        share: what this rank's sum counts in the one over the whole world.
    """

    parameter: Any
    part: slice
    share: float


class PullToStart:
    """Adds the gradient and reports the term.

    Args:
        chunks: this rank's bare model chunks, in Megatron's DDP.
        groups: the student's ``ProcessGroupCollection``.
        originals: those of everything that trains.
        optimizer: Megatron's.
        weight_at: the weight after that many optimizer steps.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        groups: Groups,
        originals: OriginalParameters,
        optimizer: Optimizer,
        weight_at: Callable[[int], float],
    ) -> None:
        self._config = chunks[0].config
        self._device = next(chunks[0].parameters()).device
        self._originals = originals
        self._weight_at = weight_at
        self._held = []
        for parameter in originals.parameters:
            part, copies = compat.optimized_part(optimizer, parameter)
            if part.start < part.stop:
                share = counts_here(parameter, groups, replicated=copies is None) / (copies or 1)
                self._held.append(_Held(parameter, part, share))

    def end(self, iteration: int, reports: Any) -> None:
        """After the schedule of a step that trains, before the optimizer's.

        Args:
            iteration: optimizer steps taken so far.
            reports: on the last stage, one dictionary per micro-batch of this step.

        Collectives: one all-reduce of one number over the whole world.
        """
        factor = self._weight_at(iteration) * loss_scale(self._config, self._device)
        total = torch.zeros((), device=self._device)
        with torch.no_grad():
            for parameter, part, share in self._held:
                original = self._originals.of(parameter, part)
                change = compat.optimized_values(parameter, part).float() - original
                total += 0.5 * share * change.square().sum()
                parameter.main_grad.view(-1)[part] += change * factor
        dist.all_reduce(total)
        add_reports(reports, {REPORTED: sum_and_count(total, torch.ones_like(total))})
