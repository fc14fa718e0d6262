"""Distributed-optimizer checkpoints where neither Transformer Engine nor Apex is there."""

from __future__ import annotations

from typing import Any

import torch

from megatron_moe_inject.host.lane_uses import (
    LANE_LOAD,
    LANE_SET_STATES,
    LANE_STATE_DICT,
    UNTOUCHED_STATE,
)
from megatron_moe_inject.host.wrap import Call, wrap_function, wrap_method


def load_distributed_optimizer_without_te() -> None:
    """Let distributed-optimizer checkpoints be loaded where neither TE nor Apex is installed.

    With torch's Adam the step count is kept per parameter, and ``DistributedOptimizer`` (0.18.2
    to 0.20 development) trips over it three times: ``state_dict`` demands a step before any has
    been taken, the tensors read for a parameter come without a step or with a stale one, and
    ``load_state_dict`` gives all parameters one shared step tensor, which then counts once per
    parameter and step.
    Idempotent; does nothing where TE or Apex is there.
    """
    from megatron.core.optimizer import distrib_optimizer

    if not distrib_optimizer.HAVE_APEX_OR_TE:
        wrap_function(LANE_STATE_DICT, _state_dict)
        wrap_function(LANE_LOAD, _load_state_dict)
        wrap_function(LANE_SET_STATES, _set_states)


def _state_dict(call: Call) -> Any:
    inner = call["self"].optimizer
    if inner.state_dict()["state"]:
        return call()
    untouched = wrap_method(inner, UNTOUCHED_STATE, _with_a_step)
    try:
        return call()
    finally:
        untouched.remove()


def _with_a_step(call: Call) -> dict[str, Any]:
    return call() | {"state": {0: {"step": torch.zeros(())}}}


def _load_state_dict(call: Call) -> None:
    call()
    for state in call["self"].optimizer.state.values():
        state["step"] = state["step"].clone()


def _set_states(call: Call) -> None:
    with torch.no_grad():  # in float32 the optimizer writes into views of the parameters themselves
        call(tensors=call["tensors"] | {"step": None})
