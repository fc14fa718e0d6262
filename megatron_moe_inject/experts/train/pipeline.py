"""No gradients travel between pipeline stages below the gradient boundary.

Megatron's schedules send a gradient down every edge between two stages. Below the boundary none
is needed, so the stages there run forward only: their inputs belong to no graph (``boundary.py``),
which leaves the upper side nothing to send, and ``BoundaryCommunicator`` is what keeps the lower
side from waiting for it. It is handed to the stock schedule, which then gets ``None`` for such a
gradient and skips a backward that has no graph.

Under interleaving the schedule says that a gradient is due, not for which model chunk. It asks in
the order of its backward passes, so that order, from the schedule's own table, tells them apart.

The v-th stage that a micro-batch passes is chunk ``v // P`` of pipeline rank ``v % P`` of P.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from megatron_moe_inject.host import compat
from megatron_moe_inject.host.errors import (
    RecipeError,
)
from megatron_moe_inject.host.megatron_types import Chunk, Config
from megatron_moe_inject.host.model_parts import (
    decoder_layers,
)
from megatron_moe_inject.host.step import Step, StepPart

Tensors = torch.Tensor | list[torch.Tensor | None] | None
"""What goes over an edge between stages, as Megatron's schedules have it: one or several."""


def agree_forward_stages(
    chunks: Sequence[Chunk], boundary: int, pp_group: dist.ProcessGroup
) -> int:
    """How many leading stages run forward only: they and all before them lie below the boundary.

    Args:
        chunks: this rank's bare model chunks.
        boundary: the agreed position (``agree_boundary``).

    Collectives: one all-gather of an int64 per chunk over ``pp_group``.
    """
    device = next(chunks[0].parameters()).device
    highest = [max((at.layer_number for at in decoder_layers(c)), default=0) for c in chunks]
    local_highest = torch.tensor(highest, device=device)
    ranks = [torch.empty_like(local_highest) for _ in range(pp_group.size())]
    dist.all_gather(ranks, local_highest, group=pp_group)
    up_to_stage = list(accumulate(torch.stack(ranks, dim=1).flatten().tolist(), max))
    # The last stage ends in the loss, whatever trains.
    return sum(layers <= boundary for layers in up_to_stage[:-1])


def receives(
    num_microbatches: int, chunks: int, rank: int, size: int, group_size: int | None
) -> Iterator[int]:
    """The stages, on pipeline rank ``rank`` of ``size``, for which a schedule wants gradients.

    Args:
        chunks: model chunks of each rank; more than one is the interleaved schedule.
        group_size: its ``microbatch_group_size_per_vp_stage``.

    Yields:
        one stage for each gradient of a step, in the order in which the schedule asks for them.
    """
    order = [0] * num_microbatches
    if chunks > 1:
        table = get_schedule_table(num_microbatches, chunks, group_size)
        order = [chunks - 1 - chunk for _, chunk in table]
    for chunk in order:
        if rank < size - 1:
            yield chunk * size + rank
        elif chunk > 0:
            # The last rank gets, from the first, the gradients of that rank's next chunk.
            yield (chunk - 1) * size + rank


class _Arrived:
    """Handle of a message that nobody sends."""

    def wait(self) -> None:
        """Nothing to wait for."""


class BoundaryCommunicator(P2PCommunicator):
    """Megatron's communicator without the gradients that the leading stages would get.

    For training steps; a forward-only pass needs none. Every rank of the pipeline uses one, with
    the same number of stages.

    Args:
        pp_group: the pipeline's process group.
        config: configuration of the model chunks.
        chunks: model chunks of each rank.
        forward_stages: leading stages that run forward only (``agree_forward_stages``).
    """

    def __init__(
        self, pp_group: dist.ProcessGroup, config: Config, chunks: int, forward_stages: int
    ) -> None:
        super().__init__(pp_group, config)
        self._chunks = chunks
        self._forward_stages = forward_stages
        self._receives: Iterator[int] = iter(())

    def begin(self, num_microbatches: int, given: Any) -> dict[str, Any]:
        """Start a step; the arguments by which the schedule uses this communicator.

        Args:
            given: the communicator that the schedule would have got.

        Raises:
            RecipeError: there is one, which would wait for gradients that nobody sends.
        """
        if given is not None:
            raise RecipeError(
                f"p2p_communicator: the script hands {type(given).__name__} to the schedule, but "
                f"the first {self._forward_stages} pipeline stages get no gradients; leave it to "
                "Megatron, or let the embedding train"
            )
        self._receives = receives(
            num_microbatches,
            self._chunks,
            self.pp_group.rank(),
            self.pp_group.size(),
            self.config.microbatch_group_size_per_vp_stage,
        )
        return {"p2p_communicator": self, "pg_collection": compat.schedule_groups()}

    def end(self) -> None:
        """The schedule has asked for all gradients of the step."""
        assert next(self._receives, None) is None, "the schedule has left out a gradient"

    def _comes(self) -> bool:
        """Whether the gradient that the schedule asks for now is sent."""
        stage = next(self._receives, None)
        assert stage is not None, "the schedule asks for one gradient too many"
        return stage >= self._forward_stages

    def recv_backward(self, tensor_shapes: Any, is_last_stage: bool) -> Tensors:
        return super().recv_backward(tensor_shapes, is_last_stage or not self._comes())

    def send_backward(self, input_tensor_grads: Tensors, is_first_stage: bool) -> None:
        gradients = (
            input_tensor_grads if isinstance(input_tensor_grads, list) else [input_tensor_grads]
        )
        nothing = all(grad is None for grad in gradients)
        super().send_backward(input_tensor_grads, is_first_stage or nothing)

    def send_forward_recv_backward(
        self, output_tensors: Tensors, tensor_shapes: Any, is_last_stage: bool
    ) -> Tensors:
        if is_last_stage or self._comes():
            return super().send_forward_recv_backward(output_tensors, tensor_shapes, is_last_stage)
        super().send_forward(output_tensors, is_last_stage)
        return [None] * len(output_tensors) if isinstance(output_tensors, list) else None

    def send_backward_recv_backward(
        self,
        input_tensor_grad: torch.Tensor | None,
        recv_next: bool,
        tensor_shape: Any,
        overlap_p2p_comm: bool = False,
    ) -> Any:
        comes = recv_next and self._comes()
        received = super().send_backward_recv_backward(
            input_tensor_grad, comes, tensor_shape, overlap_p2p_comm
        )
        if overlap_p2p_comm and recv_next and not comes:
            # The schedule waits on its handles in turn, one for each gradient it asked for.
            received[1]["recv_next"] = _Arrived()
        return received

    def send_forward_backward_recv_forward_backward(
        self,
        output_tensor: torch.Tensor,
        input_tensor_grad: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
    ) -> Any:
        return super().send_forward_backward_recv_forward_backward(
            output_tensor,
            input_tensor_grad,
            recv_prev=recv_prev,
            recv_next=recv_next and self._comes(),
            tensor_shape=tensor_shape,
        )


class BoundaryStep(StepPart):
    """Lets the schedule of steps that train talk through a ``BoundaryCommunicator``."""

    def __init__(self, communicator: BoundaryCommunicator) -> None:
        self._communicator = communicator

    def begin(self, step: Step) -> None:
        """Hand the communicator to the schedule."""
        if step.training:
            communicator = step.arguments.get("p2p_communicator")
            step.arguments |= self._communicator.begin(len(step.labels), communicator)

    def end(self, step: Step, reports: Any) -> None:
        """The schedule must have asked for every gradient."""
        if step.training:
            self._communicator.end()


def boundary_step(
    chunks: Sequence[Chunk], forward_stages: int, pp_group: dist.ProcessGroup
) -> BoundaryStep | None:
    """The part of these chunks' steps, None where Megatron's own communicator is right."""
    if forward_stages == 0:
        return None
    return BoundaryStep(
        BoundaryCommunicator(pp_group, chunks[0].config, len(chunks), forward_stages)
    )


def gets_no_graph(chunk: int, forward_stages: int, pp_group: dist.ProcessGroup) -> bool:
    """Whether what this rank's ``chunk`` receives from the stage before needs no gradient."""
    stage = chunk * pp_group.size() + pp_group.rank()
    return 0 < stage <= forward_stages
