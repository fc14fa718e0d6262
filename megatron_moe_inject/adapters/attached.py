"""Adapters on the layers of a student: where they act, and under which keys they are stored.

The stock layer stays as it is and owns its weight; the adapter is a child module of it, so that
DDP, the optimizer and pre-hooks see it. In checkpoints a factor is a tensor of its own,
``<module>.inject_adapter.<a or b>.<set>.<layer>[.<expert>]`` beside the stock tensors, with
global numbers, the same for grouped experts and for modules of their own, at every layout. A set
is an entry of ``train.adapters`` or, with ``by: domain``, one domain's of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_moe_inject.adapters.blocks import LabelsAt, LabelsOfRows, OfDomain, suffixes
from megatron_moe_inject.adapters.grouped import GroupedLowRank, OfExpert
from megatron_moe_inject.adapters.low_rank import COLUMN, ROW, LowRank, Sharding
from megatron_moe_inject.adapters.matrices import Matrix
from megatron_moe_inject.adapters.token_labels import ChunkLabels
from megatron_moe_inject.adapters.uses import (
    COLUMN_FORWARD,
    GROUPED_FORWARD,
    GROUPED_SHARDED,
    LINEAR_SHARDED,
    ROUTER_GATING,
    ROUTER_SHARDED,
    ROW_FORWARD,
    TE_FORWARD,
    TE_NORM_FORWARD,
    TE_SHARDED,
)
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.megatron_types import Chunk
from megatron_moe_inject.host.model_parts import ADAPTER, EXPERTS, local_weights
from megatron_moe_inject.host.wrap import Call, wrap_method
from megatron_moe_inject.recipe.adapter import FactorSet

_A_AXIS, _B_AXIS = {ROW: 1}, {COLUMN: 0}


class Attached:
    """The adapters of one module.

    Args:
        found: its matrices that get one, each with the positions of its sets, which are of one
            entry: one matrix, or several of a grouped layer.
        sets: of the recipe.
        chunk: the bare one that the module is in.
        stored: asks whether the checkpoint to be loaded or saved holds them.
        labels: tells the chunk's places of which domain their tokens are.
    """

    def __init__(
        self,
        found: Sequence[tuple[Matrix, Sequence[int]]],
        sets: Sequence[FactorSet],
        chunk: Chunk,
        stored: Callable[[], bool],
        labels: Callable[[], ChunkLabels],
    ) -> None:
        self._found = found
        self._sets = sets
        self._groups = compat.process_groups(chunk)
        self._config = chunk.config
        self._stored = stored
        matrix, numbers = found[0]
        module, sharding = matrix.module, self._sharding(matrix)
        self._labels_at: LabelsAt | None = None
        self._labels_of_rows: LabelsOfRows | None = None
        if any(sets[own[0]].domain is not None for _, own in found):
            if matrix.place.component == EXPERTS:
                assert matrix.place.layer is not None, "experts are those of layers"
                self._labels_of_rows = labels().of_experts(matrix.place.layer)
                self._expert = _expert(matrix)
            else:
                self._labels_at = labels().at_place()
        self._by_outputs = matrix.kind == ROW
        if matrix.local is not None:
            chosen = [self._of_expert(m, numbers) for m, numbers in found]
            self.adapter: Any = GroupedLowRank(local_weights(module), chosen, sharding)
            forward, around = GROUPED_FORWARD, self._grouped
        else:
            entry = sets[numbers[0]].entry
            self.adapter = LowRank(
                matrix.weight,
                entry.rank,
                entry.scale,
                sharding,
                matrix.drawn_by,
                self._domains(numbers),
            )
            forward, around = _forward_of(module, matrix.place.component), self._added
            if matrix.place.component == "router":
                around = self._gating
        self._module = module
        self._input = forward.parameters[0]
        self._behind_norm = forward is TE_NORM_FORWARD
        if self._behind_norm:
            module.return_layernorm_output = True
        if matrix.place.component != "output_layer":  # whose product is the loss's
            wrap_method(module, forward, around)
        wrap_method(module, _sharded_of(module, matrix), self._sharded_state_dict)
        module.register_load_state_dict_post_hook(self._forgive)
        module.add_module(ADAPTER, self.adapter)

    @property
    def parameters(self) -> list[tuple[int, str, torch.nn.Parameter]]:
        """Set, factor (``a`` or ``b``) and parameter of each."""
        return [
            (number, factor, self.adapter._parameters[self._name(factor, matrix, number)])
            for matrix, numbers in self._found
            for number in numbers
            for factor in "ab"
        ]

    def _domains(self, numbers: Sequence[int]) -> tuple[OfDomain, ...]:
        """Of sets on one matrix; none where they are for all tokens."""
        sets = [self._sets[number] for number in numbers]
        return tuple(
            OfDomain(s.label, s.domain)
            for s in sets
            if s.domain is not None and s.label is not None
        )

    def _of_expert(self, matrix: Matrix, numbers: Sequence[int]) -> OfExpert:
        entry = self._sets[numbers[0]].entry
        assert matrix.local is not None, "of a grouped layer"
        return OfExpert(
            matrix.local,
            _expert(matrix),
            entry.rank,
            entry.scale,
            matrix.drawn_by,
            self._domains(numbers),
        )

    def _sharding(self, matrix: Matrix) -> Sharding:
        expert = matrix.place.component == EXPERTS
        group = self._groups.expt_tp if expert else self._groups.tp
        sequence = bool(self._config.sequence_parallel) and not expert
        return Sharding(matrix.kind, group, sequence and self._groups.tp.size() > 1, expert)

    def _name(self, factor: str, matrix: Matrix, number: int) -> str:
        """Of a parameter of the adapter."""
        ((suffix, _),) = suffixes(self._domains([number]))
        return factor + ("" if matrix.local is None else str(_expert(matrix))) + suffix

    def _added(self, call: Call) -> Any:
        """A linear layer's forward: its output with the change, and its bias."""
        x, results = call[self._input], call()
        if self._behind_norm:  # Transformer Engine's layer gives the normed input besides
            if self._module.te_return_bias:
                output, bias, x = results
            else:
                (output, x), bias = results
        else:
            output, bias = results
        return (output + self._change(x, output) if self.adapter.on else output), bias

    def _change(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Of a layer's output, given its input; rows of experts, or tokens of this rank."""
        if self._labels_of_rows is not None:
            return self.adapter(x, self._labels_of_rows(self._expert, len(x)))
        if self._labels_at is not None:
            tokens = output if self._by_outputs else x
            return self.adapter(x, self._labels_at(tokens.shape[:-1]))
        return self.adapter(x)

    def _gating(self, call: Call) -> torch.Tensor:
        """``Router.gating``: states ``[l, b, h]`` to logits ``[l, b, E]``."""
        logits = call()
        if not self.adapter.on:
            return logits
        return logits + self._change(call["input"], logits).to(logits.dtype)

    def _grouped(self, call: Call) -> Any:
        """A grouped layer's forward: rows ``[m, n]`` and the number of each expert's."""
        output, bias = call()
        if self.adapter.on:
            output = self.adapter(call["x"], call["m_splits"], output, self._labels_of_rows)
        return output, bias

    def _forgive(self, module: torch.nn.Module, incompatible: Any) -> None:
        if not self._stored():
            keys = [key for key in incompatible.missing_keys if f"{ADAPTER}." in key]
            for key in keys:
                incompatible.missing_keys.remove(key)

    def _is_gated(self, matrix: Matrix) -> bool:
        """Whether the rows are a gate's and then those that it gates, on each rank."""
        first = matrix.name.endswith("linear_fc1.weight")
        return first and bool(self._config.gated_linear_unit)

    def _sharded_state_dict(self, call: Call) -> dict[str, Any]:
        """Stock's, with the factors under keys of their own, or without them."""
        state, prefix = call(), call["prefix"]
        metadata = call["metadata"] or {}
        for name in list(state):
            if name.startswith(f"{prefix}{ADAPTER}."):
                del state[name]
        if not self._stored():
            return state
        for matrix, numbers in self._found:
            for number, factor in itertools.product(numbers, "ab"):
                local = f"{prefix}{ADAPTER}.{self._name(factor, matrix, number)}"
                state[local] = self._shard(matrix, number, factor, prefix, metadata)
        return state

    def _shard(
        self, matrix: Matrix, number: int, factor: str, prefix: str, metadata: Mapping[str, Any]
    ) -> Any:
        """One factor as Megatron stores it."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        sharding, axes = self._sharding(matrix), {"a": _A_AXIS, "b": _B_AXIS}[factor]
        name = self._name(factor, matrix, number)
        (shard,) = make_sharded_tensors_for_checkpoint(
            {"": self.adapter._parameters[name]},
            f"{prefix}{ADAPTER}.{name}",
            {"": axes[matrix.kind]} if matrix.kind in axes else {},
            (),
            tp_group=sharding.group,
            dp_cp_group=metadata.get("dp_cp_group") or self._groups.dp_cp,
        ).values()
        if matrix.place.component == EXPERTS:
            shard.replica_id = (*shard.replica_id[:2], self._groups.expt_dp.rank())
        numbers = map(str, (number, *matrix.numbers))
        shard = replace(shard, key=".".join([f"{prefix}{ADAPTER}.{factor}", *numbers]))
        return _by_gate(shard) if factor == "b" and self._is_gated(matrix) else shard


def _expert(matrix: Matrix) -> int:
    assert matrix.place.expert is not None, "grouped layers are those of experts"
    return matrix.place.expert


def _forward_of(module: torch.nn.Module, component: str) -> Any:
    if component == "router":
        return ROUTER_GATING
    if not hasattr(module, "input_is_parallel") and not hasattr(module, "gather_output"):
        return TE_NORM_FORWARD if hasattr(module, "return_layernorm_output") else TE_FORWARD
    return ROW_FORWARD if hasattr(module, "input_is_parallel") else COLUMN_FORWARD


def _sharded_of(module: torch.nn.Module, matrix: Matrix) -> Any:
    if matrix.place.component == "router":
        return ROUTER_SHARDED
    if matrix.local is not None:
        return GROUPED_SHARDED
    local = hasattr(module, "input_is_parallel") or hasattr(module, "gather_output")
    return LINEAR_SHARDED if local else TE_SHARDED


def _by_gate(shard: Any) -> Any:
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    return apply_swiglu_sharded_factory(shard, ())
