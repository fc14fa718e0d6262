"""The door of new experts in a run: whose it is, how far it is open, what checkpoints say of it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_moe_inject.host.attached_loss import add_reports, sum_and_count
from megatron_moe_inject.host.beside import Door
from megatron_moe_inject.host.errors import RecipeError, fail
from megatron_moe_inject.host.layer_pattern import pattern_of
from megatron_moe_inject.host.megatron_types import Chunk
from megatron_moe_inject.host.new_experts import NewExperts, card_of_run
from megatron_moe_inject.host.open_door import STORED, OpenDoor, door_for
from megatron_moe_inject.host.step import Step, StepPart
from megatron_moe_inject.host.stored_checkpoint import StoredCheckpoint, checkpoint_to_load
from megatron_moe_inject.host.to_device import to_device
from megatron_moe_inject.recipe.run_kinds import INJECTION
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext, RunPart
from megatron_moe_inject.recipe.schedule import Weight, value_at
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.routing.door import Behind, NewExpertsDoor
from megatron_moe_inject.routing.section import ROUTING

OPEN = "new experts open"
"""The door in Megatron's log."""


def planned_door(recipe: Recipe, args: Namespace) -> dict[int, Behind]:
    """What stands behind the door that a recipe asks for, by layer. No collective.

    Args:
        recipe: its experts resolved.
        args: Megatron's arguments.

    Raises:
        RecipeError: the checkpoint has no new experts, or no domain chose one of them.
    """
    card = card_of_run(args)
    if card is None:
        raise RecipeError(
            "routing.open: opens new experts, but the student's checkpoint has none: load one that "
            "moe-inject add-experts wrote, or remove it",
            "routing.open",
        )
    named = card.among(recipe.experts_by_layer())
    behind = {layer: _behind(card, layer, ids) for layer, ids in named.items()}
    if not behind:
        raise RecipeError(
            "routing.open: opens new experts, but no domain chose one; write experts: {new: all} "
            "in a domain, or remove it",
            "routing.open",
        )
    return behind


def _behind(card: NewExperts, layer: int, ids: Sequence[int]) -> Behind:
    donors = dict(zip(card.new.get(layer, ()), card.donors.get(layer, ()), strict=False))
    return Behind(ids, card.moved, [card.moved[donors[i]] for i in ids if i in donors])


class DoorStep(StepPart):
    """Opens the door step by step.

    Args:
        door: of this rank.
        device: of the reports.
        keep: gets how far it is open after each step of training.
    """

    def __init__(
        self, door: NewExpertsDoor, device: torch.device, keep: Callable[[float], None]
    ) -> None:
        self._door = door
        self._device = device
        self._keep = keep

    def begin(self, step: Step) -> None:
        """As far as the iteration says."""
        self._door.begin(step.iteration)

    def end(self, step: Step, reports: Any) -> None:
        """Report it, and let checkpoints to come have what holds for the next step."""
        self._door.end(training=step.training)
        value = torch.tensor(self._door.opened(step.iteration))
        value = to_device(value, self._device)
        add_reports(reports, {OPEN: sum_and_count(value, torch.ones_like(value))})
        if step.training:
            self._keep(self._door.opened(step.iteration + 1))


class DoorPart(RunPart):
    """The door that a recipe asks for, or that of a checkpoint which is measured; provides
    ``Door``.

    Args:
        run: the run.
        door: of this rank.
        experts: by layer those behind it.
        remark: what to say at the end.
    """

    def __init__(
        self,
        run: RunContext,
        door: NewExpertsDoor,
        experts: dict[int, list[int]],
        remark: str | None = None,
    ) -> None:
        self._run = run
        self._remark = remark
        self._door = door
        self._experts = experts
        run.provide(Door, Door(door.as_begun))

    def before_ddp(self, chunks: Sequence[Chunk]) -> None:
        """Put it into the routers, before anything else stands around them. No collective."""
        self._door.put_in(chunks)

    def attach(self, student: BuiltStudent) -> DoorStep:
        """No collective."""
        return DoorStep(self._door, student.device, self.keep)

    def finish(self) -> str | None:
        """How far it was open, where only that was measured."""
        return self._remark

    def keep(self, value: float) -> None:
        """Let checkpoints to come have how far it is open."""
        setattr(self._run.args, STORED, OpenDoor(value, self._experts).plain())


def door_part(run: RunContext) -> DoorPart | None:
    """The door of a run, ``None`` where it needs none. No collective.

    Raises:
        RecipeError: the recipe's door has nothing behind it; or a checkpoint that was saved while
            one opened would be taken for open.
    """
    checkpoint = checkpoint_to_load(run.args)
    stored = _stored(checkpoint, run.args)
    asked = run.recipe[ROUTING].open if run.kind == INJECTION else None
    if asked is None:
        if run.kind == INJECTION and stored is None:
            run.warnings += unreached(run.recipe, run.args)
        return None if stored is None else _door_as_stored(run, checkpoint, stored)
    behind = planned_door(run.recipe, run.args)
    card = card_of_run(run.args)
    assert card is not None, "a door has new experts behind it"
    closed = card.rows == "closed" and stored is None
    if closed and checkpoint is not None and checkpoint.resumes:
        raise RecipeError(
            f"routing.open: {checkpoint.folder} is of an injection that began without it, and its "
            "new experts may still be closed by their routers' bias; start an injection of its own "
            "with --finetune, or remove it",
            "routing.open",
        )
    weight: Weight = asked
    door = NewExpertsDoor(behind, lambda iteration: value_at(weight, iteration), unlock=closed)
    part = DoorPart(run, door, {layer: list(b.experts) for layer, b in behind.items()})
    run.warnings += late(asked, run.args)
    goes_on = stored is not None and checkpoint is not None and checkpoint.resumes
    part.keep(stored.open if goes_on and stored is not None else value_at(asked, 0))
    return part


def late(asked: Weight, args: Namespace) -> list[str]:
    """What to say where training ends before the door is open."""
    iterations = getattr(args, "train_iters", None)
    if not iterations or (end := value_at(asked, iterations)) >= 1:
        return []
    return [
        f"routing.open is at {end:.4g} when training ends (--train-iters {iterations}): its last "
        "checkpoint cannot be exported"
    ]


def _stored(checkpoint: StoredCheckpoint | None, args: Namespace) -> OpenDoor | None:
    """The door in the checkpoint that will be loaded, in the run's layer numbers."""
    if checkpoint is None:
        return None
    where = f"{checkpoint.flag} {checkpoint.folder}"
    return door_for(checkpoint.arguments(), where, pattern_of(args))


def _door_as_stored(
    run: RunContext, checkpoint: StoredCheckpoint | None, stored: OpenDoor
) -> DoorPart | None:
    """Where a recipe asks for none: nothing for a door that is open, and for another the model as
    it was when it was saved, which can be measured."""
    setattr(run.args, STORED, stored.plain())
    if stored.open >= 1:
        return None
    assert checkpoint is not None, "it was stored there"
    if run.kind == INJECTION and not run.args.skip_train:
        raise fail(
            "routing.open", None,
            f"is not written, but {checkpoint.folder} was saved while it was at {stored.open:.4g}",
            "write the points that open it",
        )  # fmt: skip
    card = card_of_run(run.args)
    assert card is not None, "a door has new experts behind it"
    behind = {layer: _behind(card, layer, ids) for layer, ids in stored.experts.items()}
    remark = (
        f"new experts: {checkpoint.folder} was saved while routing.open was at {stored.open:.4g}, "
        "and was measured so"
    )
    door = NewExpertsDoor(behind, lambda iteration: stored.open, unlock=False)
    return DoorPart(run, door, stored.experts, remark)


def unreached(recipe: Recipe, args: Namespace) -> list[str]:
    """What to say where no token will reach new experts. No collective."""
    card = card_of_run(args)
    if card is None or recipe[ROUTING].open is not None:
        return []
    if not card.among(recipe.experts_by_layer()):
        return []
    train = recipe.train
    rate = getattr(args, "moe_router_bias_update_rate", 0)
    if card.rows == "closed" and not (train.routers and rate):
        return [
            "new experts were closed by their routers' bias, and no token reaches one until that "
            "opens: write routing.open; or Megatron moves it while train.router trains and "
            "--moe-router-bias-update-rate is above 0; or add them with --rows mean"
        ]
    if card.rows == "mean" and not (train.routers or train.router_rows or train.adapters):
        return [
            "the routers are frozen, so that no more tokens will choose the new experts than do "
            "now, which are few: set train.router_rows: true"
        ]
    return []
