"""From the recipe to the weights of a step's loss terms."""

from __future__ import annotations

from megatron_moe_inject.host.labels import GENERAL, PREFERENCE
from megatron_moe_inject.losses.objective import TermWeights
from megatron_moe_inject.losses.spec import Divergence, TokenWeighting
from megatron_moe_inject.recipe.schedule import value_at
from megatron_moe_inject.recipe.schema import Recipe


def term_weights(recipe: Recipe, iteration: int) -> dict[int, TermWeights]:
    """Loss weights after ``iteration`` optimiser steps, by domain index; ``GENERAL`` for the rest,
    ``PREFERENCE`` for answers of pairs, which have none of these terms.

    Domains without a teacher have alpha 0. General samples are distilled from the original model
    with weight gamma, by forward KL at temperature 1.
    """
    objective = recipe.objective
    divergence = Divergence(objective.divergence, objective.jsd_beta, objective.skew)
    weighting = TokenWeighting(objective.confidence, objective.skip_worse) or None
    gamma = value_at(objective.gamma, iteration)
    weights = {GENERAL: TermWeights(gamma, value_at(recipe.general_beta(), iteration))}
    if objective.preference is not None:
        weights[PREFERENCE] = TermWeights(0.0, 0.0)  # by token, of the pair: see preference.term
    for index, domain in enumerate(recipe.domains):
        alpha = value_at(recipe.alpha(domain), iteration)
        beta = value_at(recipe.beta(domain), iteration)
        weights[index] = TermWeights(alpha, beta)
        if domain.teacher is not None:
            temperature = recipe.temperature(domain)
            weights[index] = TermWeights(alpha, beta, divergence, temperature, weighting)
    return weights
