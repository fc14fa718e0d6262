"""The gradient boundary: below the first trainable layer no backward runs.

All ranks must agree on it. When one expert-parallel rank holds trainable experts and another
does not, autograd would enter the all-to-all of the backward on the first and not on the
second, and the job hangs. So the lowest trainable layer of *any* rank is taken, and on every
rank the input of that layer requires grad.

Below the boundary hidden states carry no graph. A pipeline stage still owes the previous stage
a gradient of its input, and that stage waits for it: ``_Bridge`` answers with zeros, so the
schedule stays stock and only the communication remains. Under full recompute the boundary is
moved to the input of its model chunk, because Megatron's checkpointed segments would otherwise
be cut by it.

Shapes: s sequence, b batch, h hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_moe_inject.experts.freeze import decoder_layers, first_trainable_layer


def agree_boundary(chunks: Sequence[torch.nn.Module], num_layers: int, device: torch.device) -> int:
    """Lowest trainable position over all ranks, see ``first_trainable_layer``.

    Collectives: one all-reduce (MIN) of one int64 over the whole world.
    """
    lowest = torch.tensor(first_trainable_layer(chunks, num_layers), device=device)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return int(lowest.item())


class _Bridge(torch.autograd.Function):
    """Passes ``hidden`` on as if it came from ``received``, to which it sends a zero gradient."""

    @staticmethod
    def forward(ctx, received: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        ctx.like = (received.shape, received.dtype, received.device)
        # A fresh storage: the schedule frees the outputs it sends and refuses views.
        return hidden.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        shape, dtype, device = ctx.like
        return torch.zeros(shape, dtype=dtype, device=device), None


def _requiring_grad(hidden: torch.Tensor) -> torch.Tensor:
    return hidden if hidden.requires_grad else hidden.detach().requires_grad_(True)


class GradientBoundary:
    """Hooks on one model chunk that start the backward graph at the boundary layer.

    Args:
        chunk: bare GPT model chunk.
        boundary: the agreed position (``agree_boundary``).
        full_recompute: whether the chunk runs under ``--recompute-granularity full``.
    """

    def __init__(self, chunk: torch.nn.Module, boundary: int, full_recompute: bool) -> None:
        self._received: torch.Tensor | None = None
        self._block = chunk.decoder
        layers = decoder_layers(chunk)
        first = layers[0].layer_number - 1 if layers else boundary
        last = first + len(layers)
        if boundary < 0 or not layers:
            return
        if boundary <= first or (full_recompute and boundary < last):
            if self._block.pre_process:
                self._block.register_forward_pre_hook(self._start_at_block, with_kwargs=True)
            return
        if not self._block.pre_process:
            self._block.register_forward_pre_hook(self._cut_received)
        if boundary < last:
            layers[boundary - first].register_forward_pre_hook(
                self._start_at_layer, with_kwargs=True
            )
        elif not self._block.pre_process:
            self._block.register_forward_hook(self._bridge_output)

    def _start_at_block(self, block, args, kwargs):
        if not torch.is_grad_enabled():
            return None
        if args:
            return (_requiring_grad(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": _requiring_grad(kwargs["hidden_states"])}

    def _cut_received(self, block, args):
        if torch.is_grad_enabled():
            self._received = block.input_tensor
            block.input_tensor = self._received.detach()

    def _join(self, hidden: torch.Tensor) -> torch.Tensor:
        received, self._received = self._received, None
        if received is None:
            return _requiring_grad(hidden)
        return _Bridge.apply(received, hidden)

    def _start_at_layer(self, layer, args, kwargs):
        if not torch.is_grad_enabled():
            return None
        if args:
            return (self._join(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._join(kwargs["hidden_states"])}

    def _bridge_output(self, block, args, hidden):
        if not torch.is_grad_enabled():
            return None
        return self._join(hidden)
