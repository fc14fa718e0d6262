"""Whether the optimizer state of a checkpoint belongs to what trains now.

An optimizer state is that of the parameters that trained. The policy is stored in Megatron's own
arguments in the checkpoint, so a run that goes on from one knows, before anything is built, whether
it may take the state over.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe_inject import compat
from megatron_moe_inject.experts.freeze import FreezePolicy
from megatron_moe_inject.torch_dist import TorchDistCheckpoint
from megatron_moe_inject.typed import RecipeError


@dataclass(frozen=True)
class _Loaded:
    path: Path

    def error(self, problem: str, remedy: str) -> RecipeError:
        return RecipeError(f"--load {self.path} {problem}; {remedy}")


def begin_or_resume(
    policy: FreezePolicy, args: Namespace, projections: Sequence[str] = ()
) -> str | None:
    """Record the policy for checkpoints to come, and compare it with the one to be loaded.

    A checkpoint that was saved without injection gives its weights, iteration and random numbers,
    and the optimizer starts anew, without a flag: ``args.no_load_optim`` is set.

    Args:
        policy: what trains.
        args: Megatron's arguments, changed in place.
        projections: names of the projections to teachers' widths, which train besides.

    Returns:
        A remark for the plan where the optimizer starts anew, else None.

    Raises:
        RecipeError: the checkpoint holds the optimizer state of another policy.
    """
    args.inject_policy = policy.described()
    if projections:
        args.inject_policy["projections"] = list(projections)
    if args.no_load_optim or args.ckpt_format != "torch_dist":
        return None
    folder, stored = stored_argument(args, "inject_policy")
    if folder is None:
        return None
    if stored is None:
        args.no_load_optim = True
        return (
            f"{folder} was saved without injection: its optimizer state is left, ours starts anew"
        )
    if stored != args.inject_policy:
        raise RecipeError(
            f"train: {folder} holds the optimizer state of {_shown(stored)}, but now "
            f"{_shown(args.inject_policy)} trains; add --no-load-optim to start the optimizer "
            "anew, or train what was trained"
        )
    return None


def stored_argument(args: Namespace, name: str) -> tuple[Path | None, Any]:
    """An argument of the run whose training goes on, as its checkpoint stores it.

    Returns:
        The checkpoint's folder, ``None`` where a run starts anew or the checkpoint is damaged
        (Megatron's own loading says what is wrong with it); and the value, ``None`` where the run
        had none, or the checkpoint has another format than ``torch_dist``.
    """
    folder = compat.checkpoint_to_resume(args)
    if folder is None or args.ckpt_format != "torch_dist":
        return folder, None
    try:
        return folder, vars(TorchDistCheckpoint.open(_Loaded(folder)).args).get(name)
    except RecipeError:
        return None, None


def _shown(policy: dict) -> str:
    experts = policy["experts"]
    if isinstance(experts, dict):
        layers = (f"{layer}: {ids}" for layer, ids in experts.items())
        experts = f"experts {{{', '.join(layers)}}}" if experts else ""
    else:
        experts = f"{experts} experts"
    layers = [f"layers {policy['layers']}"] if "layers" in policy else []
    named = [*policy["components"], *layers, *policy.get("patterns", ())]
    named += [f"projection {name}" for name in policy.get("projections", ())]
    return " and ".join(part for part in (experts, ", ".join(named)) if part)
