"""How routers make probabilities of logits, as Megatron's options."""

from __future__ import annotations

from typing import Any

from megatron_moe_inject.convert.architectures.configuration import key_of
from megatron_moe_inject.host.errors import fail


def softmax_router_flags(config: Any) -> dict[str, Any]:
    """A softmax over all experts, whose top k are made to sum to one (``norm_topk_prob``) or not.

    The former is a softmax over the logits of the top k, which is Megatron's default.
    """
    if not config.norm_topk_prob:
        return {"--moe-router-pre-softmax": True}
    check_more_than_one(config)
    return {}


def check_more_than_one(config: Any) -> None:
    """RecipeError where a single expert a token would get the probability 1: Megatron's router
    wants the expert's own instead."""
    if config.num_experts_per_tok == 1:
        problem = "is not served where the probabilities of a token's experts sum to 1"
        remedy = "served: two or more, or norm_topk_prob: false"
        raise fail(key_of("num_experts_per_tok"), 1, problem, remedy)


def sigmoid_router_flags(config: Any) -> dict[str, Any]:
    """Sigmoids of which the top k are chosen with a bias, in the best groups, and made to sum to
    ``routed_scaling_factor``: DeepSeek-V3, Nemotron-H.

    Megatron takes a group's score from its best k / ``topk_group`` experts, these models from its
    best two.
    """
    check_more_than_one(config)
    if not config.norm_topk_prob:
        remedy = "Megatron's sigmoid router always makes them sum to one"
        raise fail(key_of("norm_topk_prob"), config.norm_topk_prob, "is not served", remedy)
    flags = {
        "--moe-router-score-function": "sigmoid",
        "--moe-router-enable-expert-bias": True,
        "--moe-router-topk-scaling-factor": float(config.routed_scaling_factor),
        "--moe-router-dtype": "fp32",
    }
    groups, chosen = config.n_group, config.topk_group
    if (groups or 1) > 1 and chosen != groups:
        if config.num_experts_per_tok // chosen != 2:
            problem = "is not served with num_experts_per_tok = " + str(config.num_experts_per_tok)
            remedy = "Megatron scores a group by its best k / topk_group experts, the model by two"
            raise fail(key_of("topk_group"), chosen, problem, remedy)
        flags |= {"--moe-router-num-groups": groups, "--moe-router-group-topk": chosen}
    return flags
