"""How far the door of new experts was open when a checkpoint was saved (``routing.open``).

While it opens, what the run computes depends on a number that is no tensor of the model. So the
number stands in Megatron's stored arguments. Whoever reads the weights and not the number would
have another model, so that ``refuse_half_open`` stands wherever ``refuse_adapters`` does.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from megatron_moe_inject.host import typed
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.layer_pattern import LayerPattern
from megatron_moe_inject.host.new_experts import NewExperts, card_in

if TYPE_CHECKING:
    from megatron_moe_inject.host.torch_dist import TorchDistCheckpoint

STORED = "inject_open"
"""The door's name in Megatron's arguments."""
_NEEDED = {"remedy": "take the checkpoint as its run saved it"}


@dataclass(frozen=True)
class OpenDoor:
    """The door.

    Attributes:
        open: in [0, 1], see ``routing.section.Routing``; from 1 on the model is what its tensors
            say.
        experts: by decoder layer the new experts behind it, in the numbers of the card beside it.
    """

    open: float = field(metadata=_NEEDED)
    experts: dict[int, list[int]] = field(metadata=_NEEDED)

    def plain(self) -> dict[str, Any]:
        """As it is stored."""
        return asdict(self)


def door_in(stored: Namespace | None, where: str) -> OpenDoor | None:
    """The door in a checkpoint's arguments; ``None`` where its run had none.

    Args:
        where: what the message begins with.

    Raises:
        RecipeError: it is damaged.
    """
    plain = getattr(stored, STORED, None)
    if plain is None:
        return None
    try:
        return typed.build(OpenDoor, plain)
    except RecipeError as error:
        raise RecipeError(f"{where} has a door of new experts that cannot be: {error}") from None


def door_for(stored: Namespace | None, where: str, pattern: LayerPattern | None) -> OpenDoor | None:
    """``door_in`` in the layer numbers of another run of the same weights.

    Args:
        pattern: that run's; ``None`` for a GPT model.
    """
    door = door_in(stored, where)
    card: NewExperts | None = None if door is None else card_in(stored, where)
    if door is None or card is None:
        return door
    layers = replace(card, new=door.experts, filled=[], donors={}).in_layers_of(pattern).new
    return OpenDoor(door.open, layers)


def refuse_half_open(
    checkpoint: TorchDistCheckpoint, error: Callable[[str, str], RecipeError]
) -> None:
    """Refuse a checkpoint that was saved while its door opened, where that would be left out.

    Args:
        checkpoint: opened; its arguments are read only where they may tell of a door.
        error: makes an error that begins with the checkpoint, of a problem and a remedy.

    Raises:
        RecipeError: its door is not open.
    """
    if not checkpoint.common_mentions(STORED):
        return
    door = door_in(checkpoint.common.get("args"), "the checkpoint")
    if door is not None and door.open < 1:
        raise error(
            f"was saved while routing.open was at {door.open:.4g}: with its new experts open it is "
            "another model",
            "take a checkpoint from after the last point of routing.open",
        )
