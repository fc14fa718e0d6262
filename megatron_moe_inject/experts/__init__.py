"""The student's experts: how they are used, which are chosen, and what trains."""

from megatron_moe_inject.experts.choose.select import select_experts

__all__ = ["select_experts"]
