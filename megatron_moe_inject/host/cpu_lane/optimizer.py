"""Distributed-optimizer checkpoints where neither Transformer Engine nor Apex is there."""

from __future__ import annotations

import functools


def load_distributed_optimizer_without_te() -> None:
    """Let distributed-optimizer checkpoints be loaded where neither TE nor Apex is installed.

    With torch's Adam the step count is kept per parameter, and ``DistributedOptimizer`` (0.18.2
    to 0.20 development) trips over it three times: ``state_dict`` demands a step before any has
    been taken, the tensors read for a parameter come without a step or with a stale one, and
    ``load_state_dict`` gives all parameters one shared step tensor, which then counts once per
    parameter and step.
    Idempotent; does nothing where TE or Apex is there.
    """
    import torch
    from megatron.core.optimizer import distrib_optimizer

    kind = distrib_optimizer.DistributedOptimizer
    stock_state_dict, stock_load = kind.state_dict, kind.load_state_dict
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(stock_state_dict, "__wrapped__"):
        return

    @functools.wraps(stock_state_dict)
    def state_dict(self):
        if self.optimizer.state_dict()["state"]:
            return stock_state_dict(self)
        inner = self.optimizer.state_dict
        untouched = {0: {"step": torch.zeros(())}}
        self.optimizer.state_dict = lambda: {**inner(), "state": untouched}
        try:
            return stock_state_dict(self)
        finally:
            del self.optimizer.state_dict

    @functools.wraps(stock_load)
    def load_state_dict(self, *args, **kwargs):
        stock_load(self, *args, **kwargs)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    stock_set = kind._set_main_param_and_optimizer_states

    @functools.wraps(stock_set)
    def set_states(self, model_param, tensors):
        stock_set(self, model_param, {**tensors, "step": None})

    kind.state_dict, kind.load_state_dict = state_dict, load_state_dict
    kind._set_main_param_and_optimizer_states = set_states
