"""Ranks and scales of many modules as ``adapter_config.json`` says them.

One rank and one alpha for most, and ``rank_pattern`` and ``alpha_pattern`` for the rest. The scale
of a module is alpha / r; a pattern is a regular expression for the end of a module's name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple


class Scaled(NamedTuple):
    """Rank of a module, and the scale of its product."""

    rank: int
    scale: float

    @property
    def alpha(self) -> float:
        """By which a consumer computes the scale."""
        alpha = self.rank * self.scale
        return int(alpha) if alpha == int(alpha) else alpha


def rank_keys(modules: Mapping[str, Scaled]) -> dict[str, Any]:
    """The keys of a configuration for these modules, by pattern."""
    ranks = Counter(scaled.rank for scaled in modules.values()) or {1: 1}
    alphas = Counter(scaled.alpha for scaled in modules.values()) or {1: 1}
    rank = max(ranks, key=lambda rank: (ranks[rank], rank))
    alpha = max(alphas, key=lambda alpha: (alphas[alpha], alpha))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: s.rank for name, s in modules.items() if s.rank != rank},
        "alpha_pattern": {name: s.alpha for name, s in modules.items() if s.alpha != alpha},
    }


def config_of(base: str, modules: Mapping[str, Scaled], **more: Any) -> dict[str, Any]:
    """A configuration of low-rank adapters for a causal language model.

    Args:
        base: path of its model.
        modules: see ``rank_keys``.
        more: keys of one format.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        **rank_keys(modules),
        **more,
    }
