"""The maths of steering: per-token losses on a router's distribution. No collective, no state.

The distribution is over all experts, before any group limit and before the choice of the top k. So
a target whose group is masked out, or which is far from the top k, still gets a gradient: its
logit rises until its group, and then it, is chosen.

Shapes: t tokens, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe_inject.host.routing_watch import router_distribution

SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")


def steering_losses(
    probs: Tensor, target_mask: Tensor, *, target_mass: float, full: Tensor | None = None
) -> Tensor:
    """relu(log target_mass - log mass) of each token; mass is the probability on its targets.

    Args:
        probs: ``[t, E]``, 1 per token in sum.
        target_mask: bool ``[t, E]``, the experts that a token is steered to.
        target_mass: where steering stops, in (0, 1].
        full: bool ``[E]``, experts that can take no more tokens: what they have counts, but no
            token is pushed to them.

    Returns:
        fp32 ``[t]``; 0 for a token without targets.
    """
    pushed = probs if full is None else torch.where(full, probs.detach(), probs)
    smallest = torch.finfo(torch.float32).tiny
    mass = (pushed.float() * target_mask).sum(-1).clamp(min=smallest)
    losses = F.relu(torch.log(torch.full_like(mass, target_mass)) - mass.log())
    return losses * target_mask.any(-1)


def steering_loss(
    probs: Tensor, target_mask: Tensor, token_weight: Tensor, *, target_mass: float
) -> Tensor:
    """The steering loss of some tokens: the mean of ``steering_losses``, weighted.

    Args:
        probs: ``[t, E]``, a router's distribution over all experts.
        target_mask: bool ``[t, E]``.
        token_weight: ``[t]``, 0 or more, such as the teacher's confidence on domain tokens and 0
            on general ones.
        target_mass: probability on the targets from which on nothing is pushed, in (0, 1].

    Returns:
        fp32 scalar; 0, with a graph, where no token has weight.

    Raises:
        ValueError: ``target_mass`` is not in (0, 1].
    """
    if not 0 < target_mass <= 1:
        raise ValueError(f"target_mass: {target_mass} is not in (0, 1]")
    weight = token_weight.float()
    losses = steering_losses(probs, target_mask, target_mass=target_mass)
    return (losses * weight).sum() / weight.sum().clamp(min=torch.finfo(torch.float32).tiny)


def target_balance_losses(probs: Tensor, target_mask: Tensor, shares: Tensor) -> Tensor:
    """Balance of tokens within their target sets, as Switch Transformer's loss over a set.

    Args:
        probs: ``[t, E]``, 1 per token in sum.
        target_mask: bool ``[t, E]``.
        shares: ``[t, E]``, what part of the choices on the set goes to each of its experts, a
            constant; 1 per token in sum over its set, 0 outside.

    Returns:
        fp32 ``[t]``: n * sum over the set of share * probability within the set, where n is the
        size of the set; 1 where both are even. Only the split within the set has a gradient.
        Source: Fedus et al., Switch Transformers, arXiv 2101.03961, equation 4.
    """
    within = probs.float() * target_mask
    within = within / within.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return target_mask.sum(-1) * (shares * within).sum(-1)


def router_divergences(logits: Tensor, original_logits: Tensor, score_function: str) -> Tensor:
    """KL(original || current) between two routers' distributions, by token.

    Args:
        logits: ``[..., E]`` of the router as it is.
        original_logits: ``[..., E]`` of the original router on the same states, a constant.
        score_function: ``moe_router_score_function``.

    Returns:
        fp32 ``[...]``; exactly 0 where the logits are equal.
    """
    smallest = torch.finfo(torch.float32).tiny
    current = router_distribution(logits, score_function).clamp(min=smallest).log()
    original = router_distribution(original_logits, score_function)
    return (original * (original.clamp(min=smallest).log() - current)).sum(-1)
