"""Teacher layer states and token weights of a step, sent to the pipeline stages that need them.

The last stage has what the teachers say, wherever they run. A stage that holds a layer which
imitates one gets the states once per step, before the schedule, from the rank of the last stage at
its own data-, context- and tensor-parallel position: its context-parallel part of the sequence, and
under sequence parallelism its tensor-parallel part of that.

Shapes: n micro-batches of the step, b samples each, k samples that a teacher teaches, s full
sequence, l this rank's part of it, h_t teacher hidden.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_moe_inject.host.context_parallel import (
    context_parallel_slice,
)
from megatron_moe_inject.host.megatron_types import Groups
from megatron_moe_inject.host.step import MicroBatch
from megatron_moe_inject.host.to_device import to_device
from megatron_moe_inject.teachers.step_pass import LayeredTeacher, StepTeacher


class LayerStates(NamedTuple):
    """A teacher's layer that some stage wants: its name in the recipe, and the 0-based layer."""

    teacher: str
    layer: int


class StepTargets(NamedTuple):
    """What a stage imitates in one step.

    Attributes:
        mask: ``[n, b, l]`` float32, the loss mask.
        tokens: ``[n]`` float32, tokens of each micro-batch that count, on this context-parallel
            rank: what Megatron's loss function returns as their number.
        states: ``[k, l, h_t]`` by teacher and layer.
        readable: ``[k, l]`` float32 by teacher, 1 where it knows every token so far; teachers that
            know all tokens are left out.
    """

    mask: torch.Tensor
    tokens: torch.Tensor
    states: dict[LayerStates, torch.Tensor]
    readable: dict[str, torch.Tensor]


class FeatureExchange:
    """Sends and receives them.

    Args:
        wanted: what each pipeline stage wants, by its rank in the pipeline group; the same on
            every rank.
        widths: h_t by teacher.
        dtypes: type of its states by teacher.
        partly: teachers that lack some of the student's tokens.
        groups: the student's ``ProcessGroupCollection``.
        sequence_parallel: whether hidden states are split over the tensor-parallel group.
        device: where states live.
    """

    def __init__(
        self,
        wanted: Sequence[Sequence[LayerStates]],
        *,
        widths: Mapping[str, int],
        dtypes: Mapping[str, torch.dtype],
        groups: Groups,
        sequence_parallel: bool,
        device: torch.device,
        partly: Collection[str] = (),
    ) -> None:
        self._wanted = wanted
        self._widths = widths
        self._dtypes = dtypes
        self._pp, self._tp = groups.pp, groups.tp
        self._cp = (groups.cp.rank(), groups.cp.size())
        self._parts = (groups.tp.rank(), groups.tp.size()) if sequence_parallel else (0, 1)
        self._device = device
        self._partly = [
            [name for name in sorted(partly) if any(wish.teacher == name for wish in wishes)]
            for wishes in wanted
        ]

    def run(
        self,
        passes: Mapping[str, StepTeacher],
        batches: Sequence[MicroBatch] | None,
        labels_shape: tuple[int, int],
        taught: Mapping[str, int],
        sequence_length: int,
    ) -> StepTargets | None:
        """One exchange; ``None`` on stages that imitate nothing.

        Args:
            passes: on the last stage, the teachers, which have run.
            batches: on the last stage's rank that reads data, the step's micro-batches.
            labels_shape: ``(n, b)``.
            taught: k by teacher.
            sequence_length: s.

        Collectives: on the last stage one broadcast of the loss mask over the tensor-parallel
        group; then a send to each other stage that wants something.
        """
        rank, last = self._pp.rank(), self._pp.size() - 1
        if rank == last:
            mask, tokens = self._masks(batches, labels_shape, sequence_length)
            states = {
                wish: self._slice(_layered(passes, wish.teacher).take_layer(wish.layer))
                for wish in dict.fromkeys(wish for stage in self._wanted for wish in stage)
            }
            names = dict.fromkeys(name for stage in self._partly for name in stage)
            readable = {name: self._readable(_layered(passes, name)) for name in names}
            self._send(mask, tokens, states, readable)
            return StepTargets(mask, tokens, states, readable) if self._wanted[rank] else None
        if not self._wanted[rank]:
            return None
        n, b = labels_shape
        length = sequence_length // self._cp[1] // self._parts[1]
        mask = torch.empty(n, b, length, device=self._device)
        tokens = torch.empty(n, device=self._device)
        states = {
            wish: torch.empty(
                (taught[wish.teacher], length, self._widths[wish.teacher]),
                dtype=self._dtypes[wish.teacher],
                device=self._device,
            )
            for wish in self._wanted[rank]
        }
        readable = {
            name: torch.empty(taught[name], length, device=self._device)
            for name in self._partly[rank]
        }
        peer = dist.get_global_rank(self._pp, last)
        tensors = [mask, tokens, *states.values(), *readable.values()]
        _exchange([dist.P2POp(dist.irecv, t, peer, self._pp) for t in tensors if t.numel()])
        return StepTargets(mask, tokens, states, readable)

    def _readable(self, teacher: LayeredTeacher) -> torch.Tensor:
        """``[k, l]`` float32 of the step's samples."""
        readable = teacher.readable()
        assert readable is not None, "only teachers that lack tokens are asked"
        return self._slice(readable.float().unsqueeze(-1)).squeeze(-1).contiguous()

    def _send(
        self,
        mask: torch.Tensor,
        tokens: torch.Tensor,
        states: Mapping[LayerStates, torch.Tensor],
        readable: Mapping[str, torch.Tensor],
    ) -> None:
        operations = []
        for stage, wishes in enumerate(self._wanted[:-1]):
            if not wishes:
                continue
            peer = dist.get_global_rank(self._pp, stage)
            tensors = [mask, tokens, *(states[wish] for wish in wishes)]
            tensors += [readable[name] for name in self._partly[stage]]
            operations += [dist.P2POp(dist.isend, t, peer, self._pp) for t in tensors if t.numel()]
        _exchange(operations)

    def _masks(
        self, batches: Sequence[MicroBatch] | None, shape: tuple[int, int], length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n, b = shape
        if batches is None:
            mask = torch.empty(n, b, length, device=self._device)
        else:
            masks = [torch.as_tensor(batch["loss_mask"]).reshape(b, length) for batch in batches]
            mask = to_device(torch.stack(masks), self._device).float()
        if self._tp.size() > 1:
            dist.broadcast(mask, dist.get_global_rank(self._tp, 0), self._tp)
        rows = context_parallel_slice(mask.view(n * b, length, 1), *self._cp)
        tokens = rows.view(n, -1).sum(1)
        return self._slice(rows).view(n, b, -1), tokens

    def _slice(self, states: torch.Tensor) -> torch.Tensor:
        """This tensor-parallel rank's part of ``[k, s/c, width]`` under sequence parallelism."""
        rank, size = self._parts
        return states if size == 1 else states.chunk(size, dim=1)[rank].contiguous()


def _layered(passes: Mapping[str, StepTeacher], name: str) -> LayeredTeacher:
    """A teacher whose layers are imitated."""
    teacher = passes[name]
    assert isinstance(teacher, LayeredTeacher), f"teacher {name} has no layers to imitate"
    return teacher


def _exchange(operations: list[dist.P2POp]) -> None:
    if operations:
        for request in dist.batch_isend_irecv(operations):
            request.wait()
