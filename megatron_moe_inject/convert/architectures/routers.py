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
    if config.num_experts_per_tok == 1:
        remedy = "Megatron's router gives a single expert its probability, not 1"
        raise fail(key_of("norm_topk_prob"), True, "is not served with one expert a token", remedy)
    return {}
