"""Where a run that trains begins: at which iteration, with which recipe, over which checkpoints.

Megatron goes on from the iteration of whatever ``--load`` holds, unless ``--finetune`` is given,
and saves over whatever ``--save`` holds. Where a new injection forgets the one, or a run that
should go on has the other, it says nothing, or ends in an assertion of its data loader. So the
checkpoints are looked into before anything is built; nothing is changed.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, is_dataclass
from typing import Any

from megatron_moe_inject.host.errors import RecipeError, listing, show_path
from megatron_moe_inject.host.lineage import identity_stored
from megatron_moe_inject.host.stored_checkpoint import (
    FORMATS,
    StoredCheckpoint,
    checkpoint_to_load,
    newest_saved,
)
from megatron_moe_inject.recipe.features import sections
from megatron_moe_inject.recipe.same_recipe import leaves
from megatron_moe_inject.recipe.schema import Recipe

VALUES = "inject_recipe_values"
"""Name in Megatron's arguments: the recipe, as ``recipe_values``."""
_CHECKS_ONLY = ("verify_frozen",)
_SHOWN = 6


def check_beginning(recipe: Recipe, args: Namespace) -> list[str]:
    """Check where a run that trains begins. No collective.

    Args:
        recipe: with its experts resolved as far as their profiles are there.
        args: Megatron's arguments.

    Returns:
        What may not be meant: a student's own training goes on, or another recipe does.

    Raises:
        RecipeError: nothing is left to train; ``--save`` holds later checkpoints of another
            injection, or of none; a checkpoint cannot be read.
    """
    checkpoint = checkpoint_to_load(args)
    if checkpoint is None or not checkpoint.resumes:
        _check_save(args, 0, None)
        return []
    stored, start = checkpoint.arguments(), checkpoint.iteration or 0
    identity = identity_stored(stored)
    _check_left(args, checkpoint, stored, begins=identity is None)
    _check_save(args, start, identity)
    if identity is None:
        if start == 0:
            return []
        return [
            f"{checkpoint.folder} is of no injection and stands at iteration {start}: training "
            "goes on there, with its learning-rate schedule and data; add --finetune to begin at 0"
        ]
    changed = _changed(getattr(stored, VALUES, None), recipe)
    if not changed:
        return []
    return [f"recipe differs from that of iteration {start} in {listing(changed, _SHOWN)}"]


def recipe_values(recipe: Recipe) -> dict[str, str]:
    """Every value of a recipe, defaults included, in JSON by its key; long ones as a hash."""
    plain = recipe.plain()
    for key, section in sections().items():
        value: Any = recipe[section]
        plain[key] = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    return {k: v for k, v in leaves("", plain) if k not in _CHECKS_ONLY}


def _changed(before: dict[str, str] | None, recipe: Recipe) -> list[str]:
    """Keys whose values differ; none where the checkpoint does not know its recipe."""
    if before is None:
        return []
    now = recipe_values(recipe)
    undecided = tuple(
        f"domains[{i}].experts."
        for i, domain in enumerate(recipe.domains)
        if domain.experts.undecided
    )
    keys = [key for key in dict.fromkeys([*now, *before]) if now.get(key) != before.get(key)]
    return [key for key in keys if not key.startswith(undecided)] if undecided else keys


def _check_left(
    args: Namespace, checkpoint: StoredCheckpoint, stored: Namespace | None, *, begins: bool
) -> None:
    """Something is left to train."""
    if args.skip_train:
        return
    done, total, flag, unit = checkpoint.iteration or 0, args.train_iters, "iters", "iteration"
    if not total:
        done = getattr(stored, "consumed_train_samples", None) or 0
        total, flag, unit = args.train_samples, "samples", "sample"
    if total and done >= total:
        remedy = "add --finetune to begin an injection at 0, or raise it" if begins else "raise it"
        raise checkpoint.error(
            f"stands at {unit} {done}, so that --train-{flag} {total} leaves nothing to train",
            remedy,
        )


def _check_save(args: Namespace, start: int, identity: str | None) -> None:
    """Nothing that this run does not go on from is saved over."""
    if not args.save or args.skip_train:
        return
    saved = newest_saved(args)
    if saved is None or (saved.iteration or 0) <= start:
        return
    other = identity_stored(saved.arguments()) if saved.format in FORMATS else None
    if other is not None and other == identity:
        return
    whose = "no injection" if other is None else "another injection"
    folder = show_path(args.save)
    goes_on = ""
    if other is not None:
        goes_on = (
            f"; to go on with that one give --load {folder} without --finetune (and the student "
            "as --pretrained-checkpoint, so that one command begins and goes on)"
        )
    raise RecipeError(
        f"--save: {folder} holds iteration {saved.iteration} of {whose}, and this run begins at "
        f"{start} and would save over it{goes_on}; to begin anew name another folder, or move it "
        "away"
    )
