"""Whether the optimizer state of a checkpoint belongs to what trains now.

An optimizer state is that of the parameters that trained. The policy is stored in Megatron's own
arguments in the checkpoint, so a run that goes on from one knows, before anything is built, whether
it may take the state over.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from megatron_moe_inject.experts.train.described import in_layers_of
from megatron_moe_inject.experts.train.freeze import EVERYTHING, FreezePolicy
from megatron_moe_inject.host.errors import (
    RecipeError,
)
from megatron_moe_inject.host.layer_pattern import pattern_of
from megatron_moe_inject.host.run_arguments import stored_argument


def begin_or_resume(
    policy: FreezePolicy, args: Namespace, besides: Mapping[str, Any] | None = None
) -> str | None:
    """Record the policy for checkpoints to come, and compare it with the one to be loaded.

    A checkpoint that was saved without injection gives its weights, iteration and random numbers,
    and the optimizer starts anew, without a flag: ``args.no_load_optim`` is set. Where everything
    trains and nothing besides, its optimizer state is that of the run, and is loaded.

    Args:
        policy: what trains.
        args: Megatron's arguments, changed in place.
        besides: what features let train besides, in plain JSON values, such as the names of
            ``projections`` to teachers' widths.

    Returns:
        A remark for the plan where the optimizer starts anew, else None.

    Raises:
        RecipeError: the checkpoint cannot be read, or holds the optimizer state of another policy.
    """
    args.inject_policy = policy.described() | {
        n: what for n, what in (besides or {}).items() if what
    }
    # Megatron would load that of a GPT checkpoint into a hybrid run all the same.
    args.no_load_optim = args.no_load_optim or args.finetune
    if args.no_load_optim:
        return None
    folder, stored = stored_argument(args, "inject_policy")
    if folder is None:
        return None
    if stored is None:
        if args.inject_policy == EVERYTHING.described():
            return None
        args.no_load_optim = True
        return (
            f"{folder} was saved without injection: its optimizer state is left, ours starts anew"
        )
    stored, pattern = _as_now(stored), pattern_of(args)
    if pattern is not None and stored_argument(args, "hybrid_layer_pattern")[1] is None:
        stored = in_layers_of(stored, pattern)
    if stored != args.inject_policy:
        raise RecipeError(
            f"train: {folder} holds the optimizer state of {_shown(stored)}, but now "
            f"{_shown(args.inject_policy)} trains; add --no-load-optim to start the optimizer "
            "anew, or train what was trained"
        )
    return None


def _as_now(policy: dict) -> dict:
    """A stored policy as it would be described now.

    Earlier versions did not store which rows of routers train. Beside selected experts they are
    theirs, and otherwise unknown, so that the policies differ.
    """
    experts = policy["experts"]
    if "router_rows" in policy["components"] and isinstance(experts, dict) and experts:
        return {"router_rows": experts} | policy
    return policy


def _shown(policy: dict) -> str:
    experts = policy["experts"]
    if policy.get("everything"):
        experts = "everything"
    elif isinstance(experts, dict):
        experts = f"experts {_by_layer(experts)}" if experts else ""
    else:
        experts = f"{experts} experts"
    layers = [f"layers {policy['layers']}"] if "layers" in policy else []
    rows = policy.get("router_rows")
    named = [n for n in policy["components"] if n != "router_rows" or rows is None]
    named += [f"router rows {_by_layer(rows)}"] if rows else []
    named += [*layers, *policy.get("patterns", ())]
    named += [f"adapters of rank {e['rank']} on {', '.join(e['targets'])}"
              for e in policy.get("adapters", ())]  # fmt: skip
    named += ["rows of the vocabulary"] if policy.get("vocabulary_rows") else []
    named += [f"projection {name}" for name in policy.get("projections", ())]
    return " and ".join(part for part in (experts, ", ".join(named)) if part)


def _by_layer(experts: dict) -> str:
    return f"{{{', '.join(f'{layer}: {ids}' for layer, ids in experts.items())}}}"
