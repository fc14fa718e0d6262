"""Which rows leave a router's choices as they were, by how it chooses.

Megatron's routers choose the k experts of the highest scores. What the chosen get depends on the
chosen alone, but for a softmax before the choice: its sum runs over all experts, so that one more
takes from all others even where it is never chosen.
"""

from __future__ import annotations

from argparse import Namespace

from megatron_moe_inject.experts.grow.starts import ROWS
from megatron_moe_inject.host.errors import RecipeError, fail

_BALANCED = ("sinkhorn", "quantile_balancing")
_FORCED = ("moe_router_force_load_balancing", "moe_router_force_biased")


def rows_of_router(args: Namespace, closes_by: str | None, asked: str | None) -> str:
    """The word of ``--rows`` that is to be used.

    Args:
        args: of the checkpoint.
        closes_by: see ``starts.NewRows``.
        asked: the word that was given.

    Raises:
        RecipeError: the router's function cannot be kept, or not in the way that was asked for.
    """
    _check_kind(args)
    rows = asked or ("closed" if closes_by else "mean")
    if rows not in ROWS:
        raise fail("--rows", rows, "is no word here", f"use {', '.join(ROWS)}")
    if rows == "closed" and closes_by is None:
        raise fail(
            "--rows", rows, "needs routers with a bias, and this checkpoint's have none",
            "use mean",
        )  # fmt: skip
    return rows


def takes_weight(args: Namespace, closed_by: str | None) -> bool:
    """Whether a new expert takes weight from others even where it is not chosen.

    Args:
        closed_by: the kind of tensor that closes it, if any does. A linear bias is part of the
            logits that the softmax sees, an expert bias is not.
    """
    before = score_function(args) == "softmax" and getattr(args, "moe_router_pre_softmax", False)
    return bool(before) and closed_by != "bias"


def score_function(args: Namespace) -> str:
    """The router's: ``softmax``, ``sigmoid`` or ``sqrtsoftplus``."""
    return getattr(args, "moe_router_score_function", None) or "softmax"


def _check_kind(args: Namespace) -> None:
    types = getattr(args, "moe_router_load_balancing_type", None) or "none"
    for kind in types if isinstance(types, list) else [types]:
        if kind in _BALANCED:
            raise fail(
                "--moe-router-load-balancing-type", kind,
                "of the checkpoint deals tokens out to all experts evenly, new ones too",
                "new experts are for routers that choose by their scores",
            )  # fmt: skip
    for name in _FORCED:
        if getattr(args, name, None):
            flag = f"--{name.replace('_', '-')}"
            raise RecipeError(
                f"{flag}: of the checkpoint makes routers choose at random; such a model has no "
                "function to keep",
                flag,
            )
    if getattr(args, "moe_router_topk_limited_devices", None):
        raise RecipeError(
            "--moe-router-topk-limited-devices: of the checkpoint makes the groups of experts "
            "those of the ranks, so that no place for new ones keeps them; set "
            "--moe-router-num-groups and --moe-router-group-topk instead and save it again",
            "--moe-router-topk-limited-devices",
        )
