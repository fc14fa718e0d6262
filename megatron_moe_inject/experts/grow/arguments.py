"""Megatron's arguments of a checkpoint that gets new experts."""

from __future__ import annotations

import copy
from argparse import Namespace

from megatron_moe_inject.host.new_experts import STORED, NewExperts

_ENDED = ("inject_policy", "inject_lineage")
"""Arguments of the injection that a checkpoint belongs to, which ends here."""


def grown_arguments(args: Namespace, card: NewExperts) -> Namespace:
    """Those of the base with the new number of experts and the card.

    Each expert has the room that it had: ``--moe-expert-capacity-factor`` grows with the number.
    """
    args = copy.copy(args)
    args.num_experts = card.experts
    if card.capacity_factor is not None:
        args.moe_expert_capacity_factor = card.capacity_factor * card.experts / card.base_experts
    for name in _ENDED:
        if hasattr(args, name):
            delattr(args, name)
    setattr(args, STORED, card.plain())
    return args
