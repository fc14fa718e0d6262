"""The matrices of a student that can have adapters, and which of a recipe's each gets.

Names are Megatron's: ``decoder.layers.3.self_attention.linear_qkv.weight`` with global layers, and
``experts.17`` for an expert wherever it is (``host.model_parts.places``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_moe_inject.adapters.low_rank import COLUMN, ROW, WHOLE
from megatron_moe_inject.host.layer_pattern import name_matches
from megatron_moe_inject.host.megatron_types import Chunk, Groups, MegatronModule
from megatron_moe_inject.host.model_parts import (
    EXPERTS,
    ParameterPlace,
    decoder_layers,
    grouped_linears,
    local_weights,
    mlp_of,
    places,
)
from megatron_moe_inject.recipe.adapter import TARGETS, FactorSet

ATTENTION = {
    "linear_qkv": COLUMN,
    "linear_q_proj": COLUMN,
    "linear_q_down_proj": WHOLE,
    "linear_q_up_proj": COLUMN,
    "linear_kv_down_proj": WHOLE,
    "linear_kv_up_proj": COLUMN,
    "linear_proj": ROW,
}
"""Linear layers of Megatron's self-attention and multi-latent attention, and their division."""
MLP = {"linear_fc1": COLUMN, "linear_fc2": ROW}


@dataclass(frozen=True)
class Matrix:
    """One linear layer, or one expert's part of a grouped one.

    Attributes:
        module: Megatron's.
        weight: this rank's part.
        kind: see ``low_rank.Sharding``.
        place: where its weight is; its component is the target's name.
        local: its number in a grouped layer; ``None`` for a layer of its own.
    """

    module: MegatronModule
    weight: torch.nn.Parameter
    kind: str
    place: ParameterPlace
    local: int | None = None

    @property
    def numbers(self) -> list[int]:
        """0-based global decoder layer and expert, as far as it is of one."""
        return [n for n in (self.place.layer, self.place.expert) if n is not None]

    @property
    def name(self) -> str:
        """The weight's, with global numbers."""
        return self.place.global_name

    @property
    def drawn_by(self) -> str:
        """The name that its A is drawn by: that of a GPT model of these weights, if there is one,
        so that a hybrid model begins as that does."""
        return self.place.gpt_name or self.place.global_name


def matrices(chunk: Chunk) -> Iterator[Matrix]:
    """All of a bare chunk, in the model's order."""
    where = {parameter: place for place, parameter in places(chunk)}
    for layer in decoder_layers(chunk):
        for module, kind in _linears(layer):
            weights = local_weights(module)
            if weights:
                for local, weight in enumerate(weights):
                    yield Matrix(module, weight, kind, where[weight], local)
            elif getattr(module, "weight", None) in where:
                yield Matrix(module, module.weight, kind, where[module.weight])
    head = getattr(chunk, "output_layer", None)
    if head is not None and chunk.post_process and head.weight in where:
        yield Matrix(head, head.weight, COLUMN, where[head.weight])


def _linears(layer: MegatronModule) -> Iterator[tuple[MegatronModule, str]]:
    attention, mlp = getattr(layer, "self_attention", None), mlp_of(layer)
    owners = [(attention, ATTENTION), (mlp, MLP), (getattr(mlp, "shared_experts", None), MLP)]
    experts = getattr(mlp, "experts", None)
    owners += [(expert, MLP) for expert in getattr(experts, "local_experts", ())]
    if experts is not None and grouped_linears(experts):
        owners.append((experts, MLP))
    for owner, names in owners:
        for name, kind in names.items():
            module = getattr(owner, name, None)
            if isinstance(module, torch.nn.Module):
                yield module, kind
    router = getattr(mlp, "router", None)
    if router is not None:
        yield router, WHOLE


def whole_shape(matrix: Matrix, groups: Groups) -> tuple[int, int]:
    """``[out, in]`` of a matrix over all ranks that divide it."""
    group = groups.expt_tp if matrix.place.component == EXPERTS else groups.tp
    rows, columns = matrix.weight.shape
    by = {COLUMN: (group.size(), 1), ROW: (1, group.size())}.get(matrix.kind, (1, 1))
    return rows * by[0], columns * by[1]


def wanted(sets: Sequence[FactorSet], place: ParameterPlace) -> dict[int, list[int]]:
    """The sets of factors that the weight at ``place`` gets, by position, each with the targets of
    its entry that name it."""
    named = {i: _naming(factors, place) for i, factors in enumerate(sets)}
    return {i: targets for i, targets in named.items() if targets}


def _naming(factors: FactorSet, place: ParameterPlace) -> list[int]:
    entry = factors.entry
    if entry.layers and place.layer not in entry.layers:
        return []
    return [j for j, target in enumerate(entry.targets) if _names(target, factors, place)]


def _names(target: str, factors: FactorSet, place: ParameterPlace) -> bool:
    if target not in TARGETS:
        return name_matches(target, place.global_name, place.gpt_name)
    if target != place.component:
        return False
    chosen = factors.selected.get(place.layer, ()) if place.layer is not None else ()
    return target != EXPERTS or factors.entry.experts == "all" or place.expert in chosen
