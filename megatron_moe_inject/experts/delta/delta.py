"""Deltas: what training changed in a student, as a folder the size of that.

A delta holds the new values of every slice that is not bitwise what it was in the base checkpoint:
an expert's matrix, a layer's norm, a whole embedding. It is a folder of safetensors files and one
``delta.json`` that names each slice, its file, and the checksum of what the base held there.
Applying it to the base gives back the trained weights bitwise, and to anything else is an error.
Both directions stream: memory is bounded by one file of the delta, whatever the student's size.

Only weights count. Optimizer, RNG and the projections of feature imitation stay behind.

A delta may come from anybody: nothing in it is code, its files are plain names in its folder that
have a checksum, and what its slices are is held against the base before anything is written.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron_moe_inject.experts.delta.adapters import AppliedAdapters, ExportedAdapters
from megatron_moe_inject.experts.delta.files import DeltaFiles
from megatron_moe_inject.experts.delta.grown import (
    AppliedGrowth,
    Growth,
    card_between,
    most_experts,
    most_experts_of,
)
from megatron_moe_inject.experts.delta.index import (
    FORMAT,
    INDEX,
    VERSION,
    DeltaFolder,
    DeltaIndex,
    Slice,
    StoredSlice,
    as_bytes,
    damaged,
    file_checksum,
    slice_checksum,
)
from megatron_moe_inject.experts.delta.weights import Weights
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.commands import must_not_exist
from megatron_moe_inject.host.domain_choice import NOTHING_CHOSEN, DomainChoice
from megatron_moe_inject.host.errors import (
    listing,
    show,
)
from megatron_moe_inject.host.files import new_folder, require_room
from megatron_moe_inject.host.gpt_names import stacked_axes
from megatron_moe_inject.host.low_rank import Rounding
from megatron_moe_inject.host.new_experts import NewExperts, card_in
from megatron_moe_inject.host.open_door import refuse_half_open
from megatron_moe_inject.host.stored_adapters import StoredAdapters, refuse_adapters
from megatron_moe_inject.host.text import ranges
from megatron_moe_inject.host.torch_dist_copy import Progress, in_turn, replaced, saved_copy

_FILE_BYTES = 4 << 30


def _silent(items: Iterable[Any], total: int) -> Iterable[Any]:
    return items


@dataclass(frozen=True)
class DeltaSummary:
    """What a delta holds.

    Attributes:
        changed: slices by the name of their tensor; matrices with adapters, and rows, besides.
        bytes: size of the values.
        base_bytes: size of all weights of the base.
        roundings: of adapters that were merged, by component.
        new_experts: the card of experts that it adds.
    """

    changed: Mapping[str, int]
    bytes: int
    base_bytes: int
    roundings: Mapping[str, Rounding] = field(default_factory=dict)
    new_experts: NewExperts | None = None


def export_delta(
    base: CheckpointPlace,
    trained: CheckpointPlace,
    output: Path,
    *,
    progress: Progress = _silent,
    file_bytes: int = _FILE_BYTES,
) -> DeltaSummary:
    """Compare two checkpoints of one model and write what differs. No collective.

    Adapters and vocabulary rows are written as they are, not merged into the weights.

    Args:
        base: before training, without adapters.
        trained: after it, at any parallel layout.
        output: a folder that does not exist; it appears whole or not at all.
        progress: shows how far it is.
        file_bytes: largest size of one file, and of what is held in memory.

    Raises:
        RecipeError: a checkpoint that cannot be read, two that are not of one model, adapters of
            another base, an output that exists, or nothing that changed.

    A checkpoint with new experts against its base before them gives a delta that adds them.
    """
    must_not_exist(output)
    opened = base.open()
    refuse_adapters(opened.tensors, base.error)
    opened_after = trained.open()
    for place, checkpoint in ((base, opened), (trained, opened_after)):
        refuse_half_open(checkpoint, place.error)
    before, after = _of_one_kind(Weights(opened), Weights(opened_after))
    stored = StoredAdapters.of(after.checkpoint)
    before = before.named_like(after.tensors)
    after = after.named_like(before.tensors)
    same_shapes = before.tensors == after.tensors
    card = None if same_shapes else card_between(opened, after.checkpoint)
    growth = None if card is None else Growth(card)
    if stored is not None and card is not None:
        raise trained.error(
            f"has adapters, and new experts that {base.path} has not",
            "merge the adapters first (moe-inject merge-adapters), or name as --base what "
            "moe-inject add-experts wrote",
        )
    names = _common_tensors(before, after, growth)
    slices = [(name, place) for name in names for place in after.places(name)]
    adapted = None if stored is None else ExportedAdapters(stored, after)
    index: dict[str, Slice] = {}
    with new_folder(output) as folder:
        files = DeltaFiles(folder, file_bytes)
        for name, place in progress(slices, len(slices)):
            old, new = _before(before, name, place, growth), after.read(name, place)
            same = old is not None and torch.equal(as_bytes(old), as_bytes(new))
            if adapted is not None:
                assert old is not None, "adapters and new experts do not meet"
                adapted.take(name, place, old, same, files)
            if same:
                continue
            entry = "@".join([name, ".".join(map(str, place))]) if place else name
            file = files.add(entry, new)
            checksum = "" if old is None else slice_checksum(old)
            index[entry] = Slice(name, list(place), checksum, file)
        adapters = None if adapted is None else adapted.index()
        if not index and adapters is None:
            raise trained.error("does not differ from the base", "name the checkpoint after it")
        files.close()
        described = DeltaIndex(
            format=FORMAT,
            version=VERSION,
            model=before.fingerprint(),
            base_iteration=before.checkpoint.folder.name,
            trained_iteration=after.checkpoint.folder.name,
            layers=before.layers,
            bytes=files.bytes,
            files={path.name: file_checksum(path) for path in sorted(folder.iterdir())},
            slices=index,
            adapters=adapters,
            new_experts=card if card is None or before.layers else card.in_layers_of(None),
        )
        described = replace(described, version=described.its_version)
        (folder / INDEX).write_text(described.text(), encoding="utf-8")
    return _summary(before, described)


def apply_delta(
    base: CheckpointPlace,
    delta: Path,
    output: Path,
    *,
    progress: Progress = _silent,
    choice: DomainChoice = NOTHING_CHOSEN,
) -> DeltaSummary:
    """Write the base with a delta applied, as a checkpoint that Megatron loads. No collective.

    The result holds weights and arguments, no optimizer state: load it with ``--finetune``.

    Args:
        base: the checkpoint that the delta was made from.
        delta: what ``export_delta`` wrote.
        output: a ``--save`` directory that does not exist; it appears whole or not at all.
        progress: shows how far it is.
        choice: of which domains adapters are merged, where each has its own.

    Raises:
        RecipeError: a damaged delta, another base, an output that exists, or adapters of which
            none or others are chosen.
    """
    must_not_exist(output)
    opened = base.open()
    refuse_adapters(opened.tensors, base.error)
    source = DeltaFolder(delta)
    described = source.index
    before = _numbered(Weights(opened), described.layers)
    adapters = described.adapters
    named = {entry.tensor for entry in described.slices.values()}
    before = before.named_like(named | set(() if adapters is None else adapters.dtypes))
    if before.fingerprint() != described.model:
        _refuse_new_experts(base, before, described)
        raise base.error("is another model than the delta's base", "name the base it was made from")
    if adapters is None:
        choice.check([], source.error)
    if described.new_experts is not None:
        growing = AppliedGrowth(source, delta, described.new_experts, before)
        growing.check_base(base, progress)
        stored = before.checkpoint.metadata.storage_data.values()
        needed = sum(info.length for info in stored) + described.bytes
        require_room(output, needed, "--output")
        with new_folder(output) as folder:
            growing.write(folder, progress)
        return _summary(before, described)
    index = described.slices
    changes = {name: [replaced(new)] for name, new in _changes(delta, index, before).items()}
    applied = None if adapters is None else AppliedAdapters(source, adapters, before, choice)
    for entry in progress(index.values(), len(index)):
        checksum = slice_checksum(before.read(entry.tensor, tuple(entry.place)))
        if checksum != entry.base_sha256:
            raise base.error(
                f"holds other values of {entry.tensor} {entry.place} than the delta's base",
                "name the base it was made from",
            )
    if applied is not None:
        applied.check_base(base)
        for name, merging in applied.changes.items():
            changes.setdefault(name, []).append(merging)
    with new_folder(output) as folder:
        by_tensor = {name: in_turn(each) for name, each in changes.items()}
        saved_copy(before.checkpoint, folder, by_tensor, progress)
    return _summary(before, described, {} if applied is None else applied.roundings())


def _before(
    before: Weights, name: str, place: tuple[int, ...], growth: Growth | None
) -> torch.Tensor | None:
    """What the base holds of a slice, ``None`` of a new expert."""
    origin = None if growth is None else growth.origin(name, place)
    if origin is None:
        return before.read(name, place)
    return None if origin.new else before.read(origin.name, origin.place)


def _refuse_new_experts(base: CheckpointPlace, held: Weights, delta: DeltaIndex) -> None:
    """RecipeError where one of base and delta has new experts, and the other has not."""
    checkpoint = held.checkpoint
    if delta.new_experts is None and most_experts(delta) > most_experts_of(held.tensors) > 0:
        raise base.error(
            "has fewer experts than the delta's base",
            "name the checkpoint with new experts that it was made from; a delta that adds them "
            "itself is one against the checkpoint before moe-inject add-experts",
        )
    card = card_in(checkpoint.common.get("args"), str(checkpoint.folder))
    if card is not None:
        raise base.error(
            f"has new experts ({ranges(card.ids())} of {card.experts}), which the delta's base has "
            "not",
            f"apply it to {card.base}"
            + ("" if delta.new_experts else ", and add the experts to the result"),
        )


def _of_one_kind(before: Weights, after: Weights) -> tuple[Weights, Weights]:
    """Both by the same names: where one is a hybrid model, by those of a GPT model."""
    if before.layers == after.layers:
        return before, after
    if before.layers is not None and after.layers is not None:
        raise after.error(
            f"has the layers {after.layers}, the base {before.layers}",
            "compare two checkpoints of one model",
        )
    problem = "is a hybrid model, and the other checkpoint a GPT model"
    return before.as_gpt(problem), after.as_gpt(problem)


def _numbered(base: Weights, layers: str | None) -> Weights:
    """The base by the names of a delta's slices."""
    if base.layers == layers:
        return base
    if layers is None:
        return base.as_gpt("is a hybrid model, and the delta's base was a GPT model")
    problem = "is a GPT model" if base.layers is None else f"has the layers {base.layers}"
    raise base.error(
        f"{problem}, and the delta's base the layers {layers}", "name the base it was made from"
    )


def _common_tensors(before: Weights, after: Weights, growth: Growth | None) -> list[str]:
    expected = before.tensors if growth is None else growth.tensors(before)
    base, after_names = expected.keys(), after.tensors.keys()
    if after_names != base:
        missing, more = sorted(base - after_names), sorted(after_names - base)
        parts = [f"lacks {listing(missing, 4)}"] if missing else []
        parts += [f"holds {listing(more, 4)} besides"] if more else []
        raise after.error(
            f"is another model than the base: it {' and '.join(parts)}",
            "compare two checkpoints of one model",
        )
    for name in base:
        old, new = expected[name], after.tensors[name]
        if old != new:
            raise after.error(
                f"has {name} as {list(new.size)} {new.dtype}, the base as {list(old.size)} "
                f"{old.dtype}",
                "compare two checkpoints of one model in one precision",
            )
    return sorted(base)


def _summary(
    base: Weights, index: DeltaIndex, roundings: Mapping[str, Rounding] | None = None
) -> DeltaSummary:
    changed = Counter(entry.tensor for entry in index.slices.values())
    if index.adapters is not None:
        changed.update(f"{entry.tensor}, adapters" for entry in index.adapters.matrices)
        changed.update({f"{entry.tensor}, rows": len(entry.ids) for entry in index.adapters.rows})
    whole = base.checkpoint.tensors.values()
    total = sum(s.size.numel() * s.properties.dtype.itemsize for s in whole)
    return DeltaSummary(changed, index.bytes, total, roundings or {}, index.new_experts)


def _changes(
    delta: Path, index: Mapping[str, Slice], base: Weights
) -> dict[str, dict[tuple[int, ...], StoredSlice]]:
    """The new values by the base's own tensors and places; every slice must be one of its, once."""
    changes: dict[str, dict[tuple[int, ...], StoredSlice]] = {}
    for name, entry in index.items():
        place, stored = tuple(entry.place), base.tensors.get(entry.tensor)
        sizes = () if stored is None else stored.size[: stacked_axes(entry.tensor)]
        exists = len(place) == len(sizes) and all(map(operator.contains, map(range, sizes), place))
        if stored is None or not exists:
            raise damaged(delta, f"has a slice {show(name)} that is none of the base's")
        shape = stored.size[len(place) :]
        new = StoredSlice(delta, entry.file, name, shape, stored.dtype)
        for tensor, own_place in base.places_of(entry.tensor, place):
            if own_place in changes.setdefault(tensor, {}):
                raise damaged(delta, f"has a slice {show(name)} that is none of the base's")
            changes[tensor][own_place] = new
    return changes
