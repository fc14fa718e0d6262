"""``moe-inject merge-adapters``: a stock checkpoint with adapters in its weights.

Stored parts are read, changed and written one at a time; all that nothing is merged into is copied
byte for byte. Adapters, other tensors of the plugin, the optimizer's state and the plugin's
arguments stay behind: stock Megatron loads the result with ``--finetune``.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.commands import must_not_exist
from megatron_moe_inject.host.domain_choice import NOTHING_CHOSEN, DomainChoice
from megatron_moe_inject.host.files import new_folder
from megatron_moe_inject.host.gpt_names import Place, stacked_axes
from megatron_moe_inject.host.low_rank import Product, Rounding, by_component, merged, rows_put_in
from megatron_moe_inject.host.model_parts import OWN_PREFIX, is_own
from megatron_moe_inject.host.new_experts import STORED as CARD
from megatron_moe_inject.host.open_door import refuse_half_open
from megatron_moe_inject.host.stored_adapters import StoredAdapters
from megatron_moe_inject.host.torch_dist_copy import Change, Progress, saved_copy


@dataclass(frozen=True)
class Merged:
    """What was merged.

    Attributes:
        roundings: what rounding to the stored type did, by component of the model.
        base: the checkpoint that the adapters began from.
    """

    roundings: Mapping[str, Rounding]
    base: str


def merge_adapters(
    trained: CheckpointPlace,
    output: Path,
    progress: Progress,
    choice: DomainChoice = NOTHING_CHOSEN,
) -> Merged:
    """Write a checkpoint whose weights are W + s B A, rounded once. No collective.

    Args:
        trained: holds adapters or vocabulary rows, at any parallel layout.
        output: a ``--save`` directory that does not exist; it appears whole or not at all.
        progress: wraps the stored parts to show how far it is.
        choice: of which domains, where each has its own.

    Raises:
        RecipeError: it holds none, not those that are chosen, or what does not fit, or the output
            exists.
    """
    must_not_exist(output)
    checkpoint = trained.open()
    refuse_half_open(checkpoint, trained.error)
    adapters = StoredAdapters.of(checkpoint)
    if adapters is None:
        raise trained.error(
            "holds neither adapters nor vocabulary rows", "load it as it is, or name another"
        )
    changes, matrices, rows = _changes(adapters.chosen(choice))
    with new_folder(output) as folder:
        saved_copy(
            checkpoint, folder, changes, progress, left_out=is_own, common=without_own_arguments
        )
    roundings = by_component(matrices, rows)
    return Merged(roundings, adapters.described.base.checkpoint)


def _changes(
    adapters: StoredAdapters,
) -> tuple[dict[str, Change], dict[str, dict[Place, Rounding]], dict[str, Rounding]]:
    """The changes by tensor, and where they count what is lost: of matrices, and of rows."""
    sources: dict[str, dict[Place, Callable[[], Sequence[Product]]]] = {}
    for site in adapters.pairs:
        name, place = site
        sources.setdefault(name, {})[place] = functools.partial(adapters.products, site)
    matrices: dict[str, dict[Place, Rounding]] = {name: {} for name in sources}
    changes = {
        name: merged(by_place, stacked_axes(name), matrices[name])
        for name, by_place in sources.items()
    }
    rows = {name: Rounding() for name in adapters.rows}
    for name, stored in adapters.rows.items():
        read = functools.partial(adapters.read, stored)
        changes[name] = rows_put_in(adapters.ids, read, rows[name])
    return changes, matrices, rows


def without_own_arguments(common: dict[str, Any]) -> dict[str, Any]:
    """What Megatron stores once for all ranks, without the plugin's arguments (but for the card of
    new experts, which are the model's) and the optimizer's groups of parameters."""
    kept = {key: value for key, value in common.items() if not key.startswith("optimizer")}
    if isinstance(kept.get("args"), Namespace):
        arguments = vars(kept["args"]).items()
        others = {k: v for k, v in arguments if k == CARD or not k.startswith(OWN_PREFIX)}
        kept["args"] = Namespace(**others)
    return kept
