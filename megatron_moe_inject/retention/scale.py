"""What a loss that is attached inside a layer must be multiplied by."""

from __future__ import annotations

from typing import Any

import torch


def step_scale(config: Any, groups: Any, tokens: int, device: torch.device) -> torch.Tensor:
    """What makes a sum over this rank's tokens one over the tokens of the step, a scalar.

    Megatron averages gradients over data- and context-parallel ranks, those of experts too; with
    ``calculate_per_token_loss`` it sums them and divides by all tokens, of which, like its own
    balance losses, this takes none to be masked.

    Args:
        config: the student's ``TransformerConfig``.
        groups: its ``ProcessGroupCollection``.
        tokens: of the step, over all data-parallel ranks.
        device: of the result.
    """
    scale = loss_scale(config, device)
    return scale * (tokens if config.calculate_per_token_loss else groups.dp_cp.size())


def loss_scale(config: Any, device: torch.device) -> torch.Tensor:
    """The optimizer's loss scale, a scalar; 1 where there is none, and where nothing trains."""
    scale = torch.ones((), device=device)
    if config.grad_scale_func is not None and torch.is_grad_enabled():
        scale = config.grad_scale_func(scale).detach().view(())
    return scale
