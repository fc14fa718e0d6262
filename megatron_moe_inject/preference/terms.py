"""What is told of pairs: names, and values from log-probabilities.

Log-probabilities alone say whether the chosen answer is the likelier one (``ranking accuracy``, as
in 2405.19534). Loss, accuracy, margin and rewards are of a reference. TRL calls them
``rewards/accuracies``, ``rewards/margins``, ``rewards/chosen``, ``logps/chosen``.

Shapes: p pairs.
"""

from __future__ import annotations

import torch

from megatron_moe_inject.losses.preference import PairTerms

LOSS = "preference loss"
ACCURACY = "preference accuracy"
MARGIN = "preference margin"
REWARD = "preference reward"
LOG_PROB = "preference log prob"
REFERENCE = "preference reference log prob"
RANKING = "preference ranking accuracy"
RANKING_EACH = f"{RANKING}/per token"
SIDES = ("chosen", "rejected")


def by_name(terms: PairTerms, log_probs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Values of every pair beside a reference, ``[p]`` each; ``log_probs`` is ``[p, 2]``."""
    values = {
        LOSS: terms.loss,
        ACCURACY: (terms.margins > 0).double(),
        MARGIN: terms.margins,
    }
    return values | of_sides(REWARD, terms.rewards) | of_sides(LOG_PROB, log_probs)


def of_sides(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of ``[p, 2]`` those of chosen and of rejected answers."""
    return {f"{name}/{side}": values[:, i] for i, side in enumerate(SIDES)}


def rankings(log_probs: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every pair, whether the chosen answer is the likelier one: whole, and for each token.

    Args:
        log_probs: ``[p, 2]``.
        tokens: of each answer, ``[p, 2]``.
    """
    each = log_probs / tokens
    return {
        RANKING: (log_probs[:, 0] > log_probs[:, 1]).double(),
        RANKING_EACH: (each[:, 0] > each[:, 1]).double(),
    }
