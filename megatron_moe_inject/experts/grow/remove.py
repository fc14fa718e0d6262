"""Takes new experts out of a checkpoint again; the old ones are bitwise what they were."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_moe_inject.experts.grow.moving import Moved
from megatron_moe_inject.experts.grow.numbering import restored
from megatron_moe_inject.experts.grow.stored_names import ExpertName, Layer
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.commands import must_not_exist
from megatron_moe_inject.host.files import new_folder, require_room
from megatron_moe_inject.host.model_parts import is_own
from megatron_moe_inject.host.new_experts import STORED, NewExperts, card_in
from megatron_moe_inject.host.stored_adapters import refuse_adapters
from megatron_moe_inject.host.torch_dist import is_training_state
from megatron_moe_inject.host.torch_dist_parts import rearranged_copy

_OF_INJECTIONS = ("inject_policy", "inject_lineage", STORED)

Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class Removed:
    """What was taken out.

    Attributes:
        card: of the checkpoint before.
        copied: bytes of the new one that are the old one's.
    """

    card: NewExperts
    copied: int


def remove_experts(
    place: CheckpointPlace,
    output: Path,
    *,
    card_of: CheckpointPlace | None = None,
    progress: Progress,
) -> Removed:
    """Write a checkpoint without its new experts. No collective.

    It holds weights and arguments, no optimizer state, and nothing of the plugin's: load it with
    ``--finetune``.

    Args:
        place: the checkpoint, before or after training.
        output: a ``--save`` directory that does not exist; it appears whole or not at all.
        card_of: a checkpoint with the card, where ``place`` has none (a run without the plugin
            saved it).
        progress: shows how far it is.

    Raises:
        RecipeError: there is no card, or it is another model's; something cannot be read or
            written.
    """
    must_not_exist(output)
    checkpoint = place.open()
    refuse_adapters(checkpoint.tensors, place.error)
    card = _card(place, card_of)
    args = copy.copy(checkpoint.args)
    if getattr(args, "num_experts", None) != card.experts:
        raise place.error(
            f"has {getattr(args, 'num_experts', None)} experts in a layer, and its card says "
            f"{card.experts}",
            "name the checkpoint that the experts were added to, or one trained from it",
        )
    args.num_experts = card.base_experts
    if card.capacity_factor is not None:
        args.moe_expert_capacity_factor = card.capacity_factor
    for name in _OF_INJECTIONS:
        if hasattr(args, name):
            delattr(args, name)
    kept = list(card.moved)

    def rows(name: ExpertName, layer: Layer, grown: torch.Tensor) -> torch.Tensor:
        return grown[kept]

    def keeps(name: str) -> bool:
        return not (is_training_state(name) or any(map(is_own, name.split("@"))))

    moved = Moved(checkpoint, restored(card.moved, card.experts), card.base_experts, keeps)
    require_room(output, sum(p.length for p in _infos(moved)), "--output")
    number = re.fullmatch(r"iter_(\d{7,})", checkpoint.folder.name)
    with new_folder(output) as folder:
        took = rearranged_copy(
            checkpoint, folder / (checkpoint.folder.name if number else "release"),
            placed=moved.placed, sizes=moved.sizes, new=moved.new_parts(rows),
            common=lambda checksum: {**checkpoint.common, "args": args}, progress=progress,
        )  # fmt: skip
        tracker = folder / "latest_checkpointed_iteration.txt"
        tracker.write_text(str(int(number[1])) if number else "release")
    return Removed(card, took.copied)


def _infos(moved: Moved) -> list[Any]:
    return [moved.checkpoint.metadata.storage_data[part] for part in moved.placed]


def _card(place: CheckpointPlace, card_of: CheckpointPlace | None) -> NewExperts:
    source = place if card_of is None else card_of
    checkpoint = source.open()
    card = card_in(checkpoint.args, str(checkpoint.folder))
    if card is None:
        raise source.error(
            "has no card of new experts",
            "name with --card the checkpoint that moe-inject add-experts wrote",
        )
    return card
