"""Frozen experts in FP8 alone: one byte a parameter, quantised once, never again.

For students that train in FP8 with grouped GEMMs. While the model is built, each layer's frozen
expert weights become FP8 parameters as soon as the layer exists, so that no more than one layer's
experts are ever in high precision. They keep their places and names in Transformer Engine's grouped
linear layers, which multiply by them as they are. Checkpoints hold them in the parameters' dtype,
decoded one by one on their way to the host, and what is loaded is encoded on its way in.

Encoding rounds (``fp8_blocks``), once: a saved checkpoint holds exactly the values that the run
computed with, and loading it gives the same codes. Weights that were published in FP8 are taken as
they were published (``native_fp8``); then a checkpoint holds bitwise what was loaded.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.nn.modules.module import register_module_module_registration_hook

from megatron_moe_inject.experts.fp8 import weights as fp8_weights
from megatron_moe_inject.experts.fp8.weights import Fp8Weight
from megatron_moe_inject.experts.train.freeze import FreezePolicy
from megatron_moe_inject.experts.train.uses import FP8_FORWARD
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.errors import (
    RecipeError,
)
from megatron_moe_inject.host.layer_pattern import LayerPattern
from megatron_moe_inject.host.megatron_types import Chunk, MegatronModule
from megatron_moe_inject.host.model_parts import (
    EXPERTS,
    ParameterPlace,
    decoder_layers,
    grouped_linears,
    local_weights,
    mlp_of,
)
from megatron_moe_inject.host.wrap import Call, wrap_method

LINEARS = ("linear_fc1", "linear_fc2")


class Source(Protocol):
    """Weights that were published in FP8."""

    def weight(self, layer: int, expert: int, linear: str) -> Fp8Weight:
        """Of a 0-based decoder layer, a global expert id, and one of ``LINEARS``; on the host."""
        ...

    def mismatch(self, layer: int, expert: int, linear: str) -> RecipeError:
        """The error for a checkpoint that holds something else there."""
        ...


class FrozenFp8:
    """Keeps the frozen experts of a student in FP8.

    Args:
        policy: what trains.
        scaling: one of ``recipe.schema.FP8_SCALINGS``, as the student's ``--fp8-recipe``.
        source: where the weights were published in FP8, None = they are encoded here.
        pattern: of a hybrid student.

    Attributes:
        count: parameters' elements of this rank that are in FP8.
    """

    def __init__(
        self,
        policy: FreezePolicy,
        scaling: str,
        source: Source | None = None,
        pattern: LayerPattern | None = None,
    ) -> None:
        self._policy = policy
        self._pattern = pattern
        self._predicts = False
        self._scaling = scaling
        self._source = source
        self._mismatch: RecipeError | None = None
        self._loaded = False
        self.count = 0

    @contextlib.contextmanager
    def while_building(self) -> Iterator[None]:
        """Inside, decoder layers that are built have their frozen experts encoded.

        No collective; no random numbers are drawn.
        """

        def registered(module: MegatronModule, name: str, child: Any) -> None:
            if name == "layers" and hasattr(module, "layer_type_list"):
                # A stack begins to be built; its layers do not know what they are for.
                self._predicts = module.is_mtp_layer
            of_depth = self._predicts or getattr(module, "is_mtp_layer", False)
            decoder = hasattr(module, "layer_number") and not of_depth
            if name == "mlp" and decoder and hasattr(child, "local_expert_indices"):
                self._encode_layer(module.layer_number - 1, child)

        handle = register_module_module_registration_hook(registered)
        try:
            yield
        finally:
            handle.remove()

    def _encode_layer(self, layer: int, moe: MegatronModule) -> None:
        if compat.runs_in_high_precision(moe.config, layer):
            return
        for name, linear in zip(LINEARS, grouped_linears(moe.experts), strict=False):
            frozen: dict[str, int] = {}
            for i, (expert, weight) in enumerate(
                zip(moe.local_expert_indices, local_weights(linear), strict=True)
            ):
                if not self._policy.trains(_place(layer, expert, name, i, self._pattern)):
                    self._encode_parameter(linear, f"weight{i}", weight)
                    frozen[f"weight{i}"] = expert
            if frozen:
                linear.register_state_dict_post_hook(functools.partial(_decode_saved, list(frozen)))
                linear.register_load_state_dict_pre_hook(
                    functools.partial(self._encode_loaded, layer, name, frozen)
                )

    def _encode_parameter(
        self, linear: MegatronModule, name: str, weight: torch.nn.Parameter
    ) -> None:
        values = weight.detach()
        if fp8_weights.is_fp8(values):  # --fp8-param-gather builds all weights so
            values = values.dequantize()
        encoded = fp8_weights.parameter(
            fp8_weights.encode(values, self._scaling), values.dtype, self._scaling
        )
        for key in ("tensor_model_parallel", "partition_dim", "partition_stride", "allreduce"):
            if hasattr(weight, key):
                setattr(encoded, key, getattr(weight, key))
        setattr(linear, name, encoded)
        self.count += encoded.numel()

    def _encode_loaded(
        self,
        layer: int,
        linear: str,
        frozen: dict[str, int],
        module: MegatronModule,
        state_dict: dict[str, Any],
        prefix: str,
        *_: Any,
    ) -> None:
        """``load_state_dict`` pre-hook: take the frozen weights in, leave nothing to be copied."""
        for name, expert in frozen.items():
            loaded = state_dict.get(prefix + name)
            if loaded is None or fp8_weights.is_fp8(loaded):
                continue
            self._loaded = True
            parameter = getattr(module, name)
            if self._source is None:
                encoded = fp8_weights.encode(loaded.to(parameter.device), self._scaling)
            else:
                encoded = self._source.weight(layer, expert, linear)
                same = torch.equal(encoded.decoded(loaded.dtype), loaded.cpu())
                if not same and self._mismatch is None:
                    self._mismatch = self._source.mismatch(layer, expert, linear)
            fp8_weights.overwrite(parameter, encoded)
            state_dict[prefix + name] = parameter.detach()

    def check(self) -> None:
        """RecipeError if no checkpoint was loaded, or not that of the model that ``source`` has."""
        if self._source is not None and self.count and not self._loaded:
            raise RecipeError(
                "train.fp8_source: no checkpoint of the student was loaded, to which these weights "
                "belong; name one with --load",
                "train.fp8_source",
            )
        if self._mismatch is not None:
            raise self._mismatch


def _place(
    layer: int, expert: int, linear: str, index: int, pattern: LayerPattern | None
) -> ParameterPlace:
    name = f"decoder.layers.{layer}.mlp.experts.{linear}.weight{index}"
    whole = f"decoder.layers.{layer}.mlp.experts.{expert}.{linear}.weight"
    in_gpt = whole if pattern is None else pattern.gpt_name(whole)
    return ParameterPlace(name, EXPERTS, layer, expert, whole, in_gpt)


def _decode_saved(
    names: Sequence[str], module: MegatronModule, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """``state_dict`` post-hook: FP8 weights as plain tensors on the host, one at a time."""
    for name in names:
        weight = state_dict.get(prefix + name)
        if weight is not None:
            encoded = fp8_weights.stored(weight)
            state_dict[prefix + name] = encoded.decoded(weight.dtype).cpu()


def drop_transposes(chunks: Iterable[Chunk]) -> None:
    """From now on layers with FP8 experts free the transposed codes after each backward pass.

    No collective.
    """
    for chunk in chunks:
        for layer in decoder_layers(chunk):
            experts = getattr(mlp_of(layer), "experts", None)
            linears = [] if experts is None else grouped_linears(experts)
            weights = [w for one in linears for w in local_weights(one) if fp8_weights.is_fp8(w)]
            if weights:
                wrap_method(experts, FP8_FORWARD, functools.partial(_forward, weights))


def _forward(weights: Sequence[torch.Tensor], call: Call) -> Any:
    states = _DropTransposes.apply(call["permuted_local_hidden_states"], weights)
    return call(permuted_local_hidden_states=states)


class _DropTransposes(torch.autograd.Function):
    """Identity on the experts' input, whose gradient is the last that their backward makes."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        ctx.weights = weights
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        for weight in ctx.weights:
            fp8_weights.drop_transpose(weight)
        return grad, None
