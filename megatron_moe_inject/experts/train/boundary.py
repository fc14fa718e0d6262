"""The gradient boundary: below the first trainable layer no backward runs.

All ranks must agree on it. When one expert-parallel rank holds trainable experts and another
does not, autograd would enter the all-to-all of the backward on the first and not on the
second, and the job hangs. So the lowest trainable layer of *any* rank is taken, and on every
rank the input of that layer requires grad, or, where only experts train in it, what its experts
put out: then neither its attention nor its frozen experts run a backward (but under delayed FP8
scaling, see ``_starts_at_experts``).

The transformer block that holds the boundary runs in two parts, both by its own stock forward:
the layers below, without recompute and without a graph, and the layers above, with whatever
recompute is configured. A graph that starts at experts is in the lower part, so under recompute
of more than attention it starts at the layer's input instead. A part is a shallow copy of the
block with fewer layers, made for each micro-batch, so what is recomputed in the backward pass
belongs to the copy of its micro-batch, and the block itself is never changed.

Under ``--overlap-moe-expert-parallel-comm`` a schedule plan runs the layers (``planned.py``).

A pipeline stage at or below the boundary makes no gradient of what it received: ``pipeline.py``
has the schedule neither send nor wait for one.

Shapes: s sequence, b batch, h hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import get_fp8_context

from megatron_moe_inject.experts.train.freeze import first_trainable_layer
from megatron_moe_inject.experts.train.uses import BOUNDARY_FORWARD, HYBRID_BOUNDARY_FORWARD
from megatron_moe_inject.host.errors import (
    RecipeError,
)
from megatron_moe_inject.host.megatron_types import Chunk, Config, MegatronModule
from megatron_moe_inject.host.model_parts import (
    decoder_layers,
    mlp_of,
)
from megatron_moe_inject.host.wrap import Call, wrap_method

_OFFLOADING = ("cpu_offloading", "fine_grained_activation_offloading")


def agree_boundary(chunks: Sequence[Chunk], num_layers: int, device: torch.device) -> int:
    """Lowest trainable position over all ranks, see ``first_trainable_layer``.

    Collectives: one all-reduce (MIN) of one int64 over the whole world.
    """
    lowest = torch.tensor(first_trainable_layer(chunks, num_layers), device=device)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return int(lowest.item())


def _requiring_grad(hidden: torch.Tensor) -> torch.Tensor:
    return hidden if hidden.requires_grad else hidden.detach().requires_grad_(True)


class GradientBoundary:
    """Starts the backward graph of one model chunk at the boundary layer. No collective.

    Forwards without gradients (evaluation, retention) are stock.

    Args:
        chunk: bare model chunk, after ``requires_grad`` is set.
        boundary: the agreed position (``agree_boundary``).
        cut: the stage before runs forward only (``pipeline.gets_no_graph``), so that what the
            chunk receives must get no gradient. So it is wherever ``boundary`` is not below the
            chunk's layers; a chunk without layers cannot know by itself.

    Raises:
        RecipeError: there are layers below the boundary, and Megatron offloads activations: it
            counts on a backward of every layer.
    """

    def __init__(self, chunk: Chunk, boundary: int, *, cut: bool = False) -> None:
        self._block = chunk.decoder
        layers = decoder_layers(chunk)
        if boundary > 0:
            refuse_offloading(chunk.config, boundary)
        if boundary < 0 or not (layers or cut):
            return
        below = boundary - (layers[0].layer_number - 1) if layers else 0
        assert self._block.pre_process or cut == (below >= 0), "stages disagree on the boundary"
        if 0 <= below < len(layers) and _starts_at_experts(layers[below]):
            layers[below].mlp.experts.register_forward_hook(_start_at_experts)
            below += 1
        if below > 0:
            self._below = min(below, len(layers))
            self._hybrid = not hasattr(self._block, "final_layernorm")
            forward = HYBRID_BOUNDARY_FORWARD if self._hybrid else BOUNDARY_FORWARD
            wrap_method(self._block, forward, self._forward)
            # Without a backward pass a checkpointed router would never count its losses.
            for layer in layers[: self._below]:
                _run_without_graphs(layer)
                for module in layer.modules():
                    if getattr(module, "moe_layer_recompute", False):
                        module.moe_layer_recompute = False
        elif below == 0:
            self._block.register_forward_pre_hook(self._start_at_block, with_kwargs=True)

    def _start_at_block(
        self, block: MegatronModule, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if not torch.is_grad_enabled():
            return None
        if block.pre_process:
            return _with_hidden(args, kwargs, _requiring_grad(_hidden(args, kwargs)))
        block.input_tensor = block.input_tensor.detach().requires_grad_(True)
        return None

    @property
    def _ends_in_norm(self) -> bool:
        """Whether the chunk's last layer is followed by the decoder's norm."""
        if self._hybrid:
            return bool(self._block.post_process and self._block.post_layer_norm)
        return self._block.final_layernorm is not None

    def _forward(self, call: Call) -> torch.Tensor:
        """In the place of the block's forward; arguments and result ``[s, b, h]`` are its own."""
        if not torch.is_grad_enabled():
            return call()
        layers_alike = self._hybrid or not call["extract_layer_indices"]
        assert layers_alike, "layers of a part are not numbered alike"
        block = self._block
        block_input = call["hidden_states"] if block.pre_process else block.input_tensor
        with _one_fp8_region(block.config):
            lower = _part(block, slice(0, self._below))
            lower.config = copy.copy(block.config)
            lower.config.recompute_granularity = None
            if self._hybrid:
                lower.post_layer_norm = False
            else:
                lower.final_layernorm = None
            hidden = call.of(lower.forward, hidden_states=block_input.detach())
            if not block.pre_process:
                # The schedule keeps what was received for a backward that never comes.
                block_input.data = block_input.new_empty(1)
            upper = _part(block, slice(self._below, None))
            if len(upper.layers):
                hidden = _requiring_grad(hidden)
            if not len(upper.layers) and not self._ends_in_norm:
                return hidden
            return call.of(upper.forward, hidden_states=hidden)


def _part(block: MegatronModule, layers: slice) -> MegatronModule:
    """A shallow copy of a transformer block with some of its layers, given its input directly.

    It shares parameters, submodules and configuration with the block, which stays as it is.
    """
    part = block.__new__(type(block))
    part.__dict__ = {name: value for name, value in vars(block).items() if name != "forward"}
    part._modules = dict(block._modules)
    part.layers = block.layers[layers]
    part.num_layers_per_pipeline_rank = len(part.layers)
    part.pre_process = True
    return part


def _keeps_histories(config: Config) -> bool:
    """Whether FP8 modules carry histories of what they have seen, by delayed scaling."""
    return bool(config.fp8) and config.fp8_recipe == "delayed"


def _one_fp8_region(config: Config) -> AbstractContextManager:
    """Delayed scaling updates its histories when the outermost region of a forward ends: once."""
    if _keeps_histories(config):
        return get_fp8_context(config)
    return nullcontext()


def _run_without_graphs(layer: MegatronModule) -> None:
    """Megatron's local CUDA graphs capture a backward pass too, which this layer does not have."""
    for name in [name for name in layer._modules if name.startswith("cudagraph_manager")]:
        manager = layer._modules.pop(name)
        if manager.func is not None:  # the graph of a method, which it had taken the place of
            setattr(layer, manager.func.__name__, manager.func)


def _starts_at_experts(layer: MegatronModule) -> bool:
    """Whether the graph may start at what the layer's experts put out.

    The same on all ranks of a stage: what they do not share are experts alone. Not under delayed
    scaling: Transformer Engine reduces histories over ranks in the backward pass of the first FP8
    module that has a graph. Were that an expert on one rank and a module of the next layer on
    another, the all-to-all between both would wait for ever.
    """
    config = layer.config
    graphs = getattr(config, "cuda_graph_impl", None) or "none"
    recomputed = config.recompute_granularity
    if recomputed == "selective" and set(config.recompute_modules or ()) <= {"core_attn"}:
        recomputed = None
    if recomputed or graphs != "none" or _keeps_histories(config):
        return False
    experts = getattr(mlp_of(layer), "experts", None)
    trained = {parameter for parameter in layer.parameters() if parameter.requires_grad}
    return experts is not None and trained <= set(experts.parameters())


def _start_at_experts(experts: MegatronModule, args: tuple, output: tuple) -> tuple | None:
    """Forward hook of a layer's experts, which return their rows and a bias."""
    if not torch.is_grad_enabled():
        return None
    return _requiring_grad(output[0]), *output[1:]


def _hidden(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _with_hidden(
    args: tuple, kwargs: dict[str, Any], hidden: torch.Tensor
) -> tuple[tuple, dict[str, Any]]:
    """A block's arguments with other hidden states."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, kwargs | {"hidden_states": hidden}


def refuse_offloading(config: Config, boundary: int) -> None:
    """Raise ``RecipeError`` where Megatron offloads activations and there are layers below."""
    for option in _OFFLOADING:
        if getattr(config, option, False):
            flag = "cpu-offloading-num-layers" if option == "cpu_offloading" else option
            raise RecipeError(
                f"--{flag.replace('_', '-')}: offloads the activations of layers in the order of "
                f"their backward passes, but the {boundary} layers below the first that trains "
                "have none; remove it (these layers keep no activations)"
            )
