"""Learning rates and decay of single parameters, in Megatron's own groups of parameters.

Megatron makes one group for each set of overrides (``ParamGroupOverride``), whose rate follows the
run's schedule from ``min_lr`` to ``max_lr``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from megatron_moe_inject.host.compat import bound_arguments

_RATE = "inject_rate"


class Rate(NamedTuple):
    """How fast a parameter trains.

    Attributes:
        lr: in learning rates of the run.
        decay: in weight decays of the run.
    """

    lr: float
    decay: float


def mark(parameter: torch.nn.Parameter, rate: Rate) -> None:
    """Let a parameter train at a rate of its own, with ``with_rates``."""
    setattr(parameter, _RATE, rate)


def with_rates(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Megatron's ``get_megatron_optimizer`` with groups for the parameters that were marked.

    Collectives: those of ``get_megatron_optimizer``.
    """
    from megatron.core.optimizer import get_standard_config_overrides
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

    bound = bound_arguments(stock, args, kwargs)
    config, overrides = bound["config"], bound.get("config_overrides")
    overrides = dict(get_standard_config_overrides(config) if overrides is None else overrides)
    rates = {
        getattr(parameter, _RATE)
        for chunk in bound["model_chunks"]
        for parameter in chunk.parameters()
        if hasattr(parameter, _RATE)
    }
    for rate in sorted(rates):
        key = ParamKey(predicate=ParamPredicate(name=f"{_RATE} {rate}", fn=_at(rate)))
        # Nothing that is as it would be anyway: a checkpoint cannot tell two such groups apart.
        if rate.decay != 1:
            overrides[key] = {"wd_mult": rate.decay}
        if rate.lr != 1:
            overrides[key] = overrides.get(key, {}) | {
                "max_lr": config.lr * rate.lr,
                "min_lr": (config.min_lr or 0.0) * rate.lr,
                # Before 0.19 groups of a checkpoint are told apart by this and not by max_lr.
                "lr_mult": rate.lr,
            }
    return stock(**bound | {"config_overrides": overrides})


def _at(rate: Rate) -> Callable[[torch.nn.Parameter], bool]:
    return lambda parameter: getattr(parameter, _RATE, None) == rate
