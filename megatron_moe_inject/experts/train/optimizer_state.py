"""Checkpoints of the optimizer when little trains.

Megatron (0.18.2 to 0.19.2) cannot save its chained optimizer in four cases that freezing brings:

- No dense parameter trains anywhere. The dense part of the chain is then a stub without an inner
  optimizer, and saving reads the inner optimizer's groups.
- Experts train, but none of them is on this rank. The inner optimizer then has groups without
  parameters and so no ``step``, which the first rank writes for all: the file has no step, or
  saving stops at an assertion.

- Experts train, but not all of a layer or not in all layers. A checkpoint stacks a parameter over
  layers and experts into one tensor, and the state of the frozen ones is a hole in it, which
  saving refuses.
- So little trains that a rank's share of it is padding, see ``empty_shares``.

All are mended on the optimizer that was built, not in Megatron's classes: a stub saves and loads
nothing, an empty inner optimizer reports the step that the other ranks are at, and the state of a
parameter is a tensor of its own, under a key that names its layer and expert by global number, so
that it can still be loaded at another parallel layout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
)

from megatron_moe_inject.experts.train.empty_shares import EmptyShares, has_empty_share
from megatron_moe_inject.experts.train.uses import (
    CHAIN_SHARDED,
    EMPTY_STATE,
    STUB_LOAD,
    STUB_SHARDED,
    STUB_STATE,
)
from megatron_moe_inject.host.own_keys import with_own_keys
from megatron_moe_inject.host.wrap import Call, wrap_method


class _NoInnerOptimizer:
    """Stands where a stub has no inner optimizer: no groups, no state."""

    def __init__(self) -> None:
        self.param_groups: list[dict] = []
        self.state: dict = {}

    def state_dict(self) -> dict:
        return {"state": {}, "param_groups": []}

    def load_state_dict(self, state_dict: dict) -> None:
        del state_dict


def _is_empty(inner: Any) -> bool:
    return not any(group["params"] for group in inner.param_groups)


def _steps(inner: Any) -> tuple[float | None, bool]:
    """Step of an inner optimizer, if it has one, and whether its groups carry it (fused Adam)."""
    for group in inner.param_groups:
        if group["params"] and "step" in group:
            return float(group["step"]), True
    for state in inner.state.values():
        if "step" in state:
            return float(state["step"]), False
    return None, False


class _EmptyState:
    """``state_dict`` of an inner optimizer without parameters, with the step of the others."""

    def __init__(self) -> None:
        self.step = 0.0
        self.in_groups = False

    def packed(self, call: Call) -> dict:
        """Stock's, with the step."""
        packed = call()
        packed["state"] = {0: {"step": torch.tensor(self.step)}}
        if self.in_groups:
            packed["param_groups"] = [g | {"step": int(self.step)} for g in packed["param_groups"]]
        return packed


def _keep_local(state: dict, name: str) -> None:
    """Leave the empty lists under ``name`` out of what the first rank writes for all ranks."""
    if name in state:
        state[name] = [LocalNonpersistentObject(group) for group in state[name]]


def _nothing(call: Call) -> dict:
    """The state of a part without parameters."""
    return {}


def _load_nothing(call: Call) -> None:
    """Such a part has nothing to load into."""


def make_checkpointable(optimizer: Any) -> Any:
    """Let ``optimizer`` be saved and loaded wherever its parameters are.

    Args:
        optimizer: what ``get_megatron_optimizer`` returned; changed in place and returned.

    Collectives: none here; each later ``sharded_state_dict`` (every rank calls it, on save and
    load) adds one all-gather of a few numbers over the whole world, and those of ``EmptyShares``.
    """
    empty: dict[int, _EmptyState] = {}
    for index, part in enumerate(optimizer.chained_optimizers):
        if part.optimizer is None:
            part.optimizer = _NoInnerOptimizer()
            wrap_method(part, STUB_STATE, _nothing)
            wrap_method(part, STUB_LOAD, _load_nothing)
            wrap_method(part, STUB_SHARDED, _nothing)
        elif _is_empty(part.optimizer):
            empty[index] = _EmptyState()
            wrap_method(part.optimizer, EMPTY_STATE, empty[index].packed)

        if hasattr(part, "gbuf_ranges") and has_empty_share(part):
            EmptyShares(part)

    def sharded_state_dict(call: Call) -> Any:
        steps = [_steps(part.optimizer) for part in optimizer.chained_optimizers]
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, steps)
        for index, state in empty.items():
            known = [r[index] for r in ranks if index < len(r) and r[index][0] is not None]
            state.step, state.in_groups = max(known, default=(0.0, False))
        packed = call()
        for index in empty:
            _keep_local(packed if len(steps) == 1 else packed[index], "fp32_from_fp16_params")
        return with_own_keys(packed)

    wrap_method(optimizer, CHAIN_SHARDED, sharded_state_dict)
    return optimizer
