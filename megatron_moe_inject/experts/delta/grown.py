"""Deltas that bring new experts: against the base as it was before they were added.

Such a delta names its slices as the grown model has them: an old expert by the id that it has now,
a new expert whole, a router whole with all of its rows. What the base held is known by the card
(``host.new_experts``), which the delta holds too. Applied to the base it adds the experts, with
their training, in one step; ``moe-inject remove-experts`` takes them out again.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_moe_inject.experts.delta.index import (
    DeltaFolder,
    DeltaIndex,
    StoredSlice,
    slice_checksum,
)
from megatron_moe_inject.experts.delta.weights import Stored, Weights
from megatron_moe_inject.experts.grow.arguments import grown_arguments
from megatron_moe_inject.experts.grow.moving import Moved
from megatron_moe_inject.experts.grow.stored_names import ExpertName, Layer, expert_name
from megatron_moe_inject.host.errors import show
from megatron_moe_inject.host.gpt_names import Place, stacked_axes
from megatron_moe_inject.host.layer_pattern import pattern_of
from megatron_moe_inject.host.model_parts import is_own
from megatron_moe_inject.host.new_experts import NewExperts, card_in
from megatron_moe_inject.host.torch_dist import (
    CheckpointSource,
    Piece,
    TorchDistCheckpoint,
    is_training_state,
)
from megatron_moe_inject.host.torch_dist_copy import Progress
from megatron_moe_inject.host.torch_dist_parts import NewPart, rearranged_copy


def card_between(base: TorchDistCheckpoint, trained: TorchDistCheckpoint) -> NewExperts | None:
    """The card of experts that one checkpoint has and the other, its base, has not; ``None`` where
    both have the same.

    Raises:
        RecipeError: a card that cannot be.
    """
    card, before = (card_in(c.common.get("args"), str(c.folder)) for c in (trained, base))
    experts = getattr(base.common.get("args"), "num_experts", None)
    return card if before is None and card is not None and experts == card.base_experts else None


class Sized(Protocol):
    """What is stored, with its shape."""

    @property
    def size(self) -> Sequence[int]: ...


def most_experts(delta: DeltaIndex) -> int:
    """Experts that a layer must have for a delta to have its slices, as far as they tell."""
    ids: list[int] = []
    for entry in delta.slices.values():
        known = expert_name(entry.tensor)
        if known is not None and known.kind == "expert":
            ids += [known.expert] if known.expert is not None else entry.place[-1:]
    return 1 + max(ids, default=-1)


def most_experts_of(tensors: Mapping[str, Sized]) -> int:
    """Experts of a layer, by the names and shapes of what is stored."""
    counts = [0]
    for name, stored in tensors.items():
        known = expert_name(name)
        if known is not None and known.kind == "expert":
            axis = known.axis
            counts.append(1 + (known.expert or 0) if axis is None else stored.size[axis])
    return max(counts)


class Origin(NamedTuple):
    """What a slice of the grown model is of its base's.

    Attributes:
        name, place: of the slice that it was; of a new expert that of another one, which has the
            same shape.
        new: it is a new expert's.
        router: it is a router's, whose first axis has become longer.
    """

    name: str
    place: Place
    new: bool
    router: bool


class Growth:
    """How slices of a grown model stand to those of its base.

    Args:
        card: of the new experts.
    """

    def __init__(self, card: NewExperts) -> None:
        self.card = card
        self._old = {now: old for old, now in enumerate(card.moved)}

    def origin(self, name: str, place: Place) -> Origin | None:
        """Of a slice, by the names of either model's kind; ``None`` of an expert that is not
        there."""
        known = expert_name(name)
        if known is None or known.kind != "expert":
            return Origin(name, place, False, known is not None)
        now = place[-1] if known.expert is None else known.expert
        if now not in range(self.card.experts):
            return None
        new = now not in self._old
        old = self._old.get(now, 0)
        if known.expert is not None:
            return Origin(known.of(old), place, new, False)
        return Origin(name, (*place[:-1], old), new, False)

    def grown(self, name: str, stored: Stored) -> Iterator[tuple[str, Stored]]:
        """What becomes of a base's tensor, under each name that it has then."""
        known = expert_name(name)
        if known is None:
            yield name, stored
        elif known.axis is None:
            assert known.expert is not None, name
            yield known.of(self.card.moved[known.expert]), stored
            if known.expert == 0:
                yield from ((known.of(new), stored) for new in self.card.ids())
        else:
            size = list(stored.size)
            size[known.axis] = self.card.experts
            yield name, dataclasses.replace(stored, size=tuple(size))

    def tensors(self, base: Weights) -> dict[str, Stored]:
        """Those of the grown model."""
        return dict(
            pair for name, stored in base.tensors.items() for pair in self.grown(name, stored)
        )


class AppliedGrowth:
    """A delta with new experts on its way into a base.

    Args:
        delta: opened.
        path: of it.
        card: its.
        base: by the names of the delta.

    Raises:
        RecipeError: slices that are none of the grown model's, or new experts that are lacking.
    """

    def __init__(self, delta: DeltaFolder, path: Path, card: NewExperts, base: Weights) -> None:
        self._delta, self._base, self._growth = delta, base, Growth(card)
        self._origins: dict[str, Origin] = {}
        self._new: dict[tuple[str, Place], StoredSlice] = {}
        self._routers: dict[tuple[str, Layer], StoredSlice] = {}
        self._changed: dict[str, dict[Place, StoredSlice]] = {}
        tensors = self._growth.tensors(base)
        taken: set[tuple[str, Place]] = set()
        for name, entry in delta.index.slices.items():
            place, stored = tuple(entry.place), tensors.get(entry.tensor)
            axes = () if stored is None else stored.size[: stacked_axes(entry.tensor)]
            inside = len(place) == len(axes) and all(
                map(operator.contains, map(range, axes), place)
            )
            origin = self._growth.origin(entry.tensor, place) if inside else None
            if stored is None or origin is None or (entry.tensor, place) in taken:
                raise delta.damaged(f"has a slice {show(name)} that is none of the grown base's")
            taken.add((entry.tensor, place))
            self._origins[name] = origin
            shape = stored.size[len(place) :]
            value = StoredSlice(path, entry.file, name, shape, stored.dtype)
            self._take(entry.tensor, place, origin, value)
        self._check_whole(tensors, taken)

    def check_base(self, source: CheckpointSource, progress: Progress) -> None:
        """That the base holds what the delta's was.

        Raises:
            RecipeError: it does not, and ``source`` says so.
        """
        slices = self._delta.index.slices
        for name, entry in progress(slices.items(), len(slices)):
            origin = self._origins[name]
            if origin.new:
                continue
            held = self._base.read(origin.name, origin.place)
            if slice_checksum(held) != entry.base_sha256:
                raise source.error(
                    f"holds other values of {origin.name} {list(origin.place)} than the delta's "
                    "base",
                    "name the base it was made from",
                )

    def write(self, output: Path, progress: Progress) -> None:
        """Write the base with its new experts into a ``--save`` directory, which is there.

        Raises:
            RecipeError: something cannot be read or written.
        """
        checkpoint, card = self._base.checkpoint, self._growth.card
        moved = Moved(checkpoint, card.moved, card.experts, _keeps)
        for part in [part for part in moved.placed if part.fqn in self._changed]:
            del moved.placed[part]
        moved.tensors = [known for known in moved.tensors if known.name not in self._changed]
        for item in moved.objects:
            if item.expert == 0:
                moved.placed[MetadataIndex(item.name)] += [
                    MetadataIndex(item.moved(new, card.experts)) for new in card.ids()
                ]
        changed = {self._target(n, p)[0] for n, places in self._changed.items() for p in places}
        for name in (*changed, *(name for name, _ in self._new)):
            known = expert_name(name)
            if known is not None and known.axis is None:
                moved.sizes[name] = tuple(checkpoint.tensors[known.of(0)].size)
        number = re.fullmatch(r"iter_(\d{7,})", checkpoint.folder.name)

        def common(checksum: str) -> dict[str, Any]:
            args = checkpoint.args
            told = dataclasses.replace(
                card.in_layers_of(pattern_of(args)),
                base=str(checkpoint.folder.absolute()),
                base_sha256=checksum,
            )
            return {**checkpoint.common, "args": grown_arguments(args, told)}

        rearranged_copy(
            checkpoint, output / (checkpoint.folder.name if number else "release"),
            placed=moved.placed, sizes=moved.sizes, new=self._parts(moved), common=common,
            progress=progress,
        )  # fmt: skip
        tracker = output / "latest_checkpointed_iteration.txt"
        tracker.write_text(str(int(number[1])) if number else "release")

    def _take(self, tensor: str, place: Place, origin: Origin, value: StoredSlice) -> None:
        """Enter a slice by the checkpoint's own names."""
        if origin.router:
            name, at = self._base.place_of(tensor, place)
            known = expert_name(name)
            assert known is not None, name
            self._routers[name, known.layer(*at)] = value
        elif origin.new:
            self._new[self._base.place_of(tensor, place)] = value
        else:
            for name, at in self._base.places_of(origin.name, origin.place):
                self._changed.setdefault(name, {})[at] = value

    def _check_whole(self, tensors: dict[str, Stored], held: set[tuple[str, Place]]) -> None:
        """Every new expert and every router is in the delta."""
        for name, stored in tensors.items():
            if expert_name(name) is None:
                continue
            axes = (range(size) for size in stored.size[: stacked_axes(name)])
            for place in itertools.product(*axes):
                origin = self._growth.origin(name, place)
                needed = origin is not None and (origin.new or origin.router)
                if needed and (name, place) not in held:
                    raise self._delta.damaged(f"lacks {name} {list(place)} of its new experts")

    def _parts(self, moved: Moved) -> Iterator[NewPart]:
        """All that is not the base's bytes, one slice at a time."""
        for (name, place), value in self._new.items():
            yield _part(name, place, value())
        for name, changes in self._changed.items():
            size = tuple(moved.checkpoint.tensors[name].size)
            for place in itertools.product(*map(range, size[: stacked_axes(name)])):
                change = changes.get(place)
                value_now = _read(moved.checkpoint, name, place) if change is None else change()
                yield _part(*self._target(name, place), value_now)

        def rows(router: ExpertName, layer: Layer, old: torch.Tensor) -> torch.Tensor:
            return self._routers[router.name, layer]()

        yield from moved.new_parts(rows)

    def _target(self, name: str, place: Place) -> tuple[str, Place]:
        """Where a slice of the base stands afterwards."""
        known, moved = expert_name(name), self._growth.card.moved
        if known is None:
            return name, place
        if known.expert is not None:
            return known.of(moved[known.expert]), place
        return name, (*place[:-1], moved[place[-1]])


def _keeps(name: str) -> bool:
    """The model alone."""
    return not (is_training_state(name) or any(map(is_own, name.split("@"))))


def _part(name: str, place: Place, value: torch.Tensor) -> NewPart:
    offset = (*place, *(0 for _ in value.shape))
    return NewPart([(name, offset)], value.reshape((*(1 for _ in place), *value.shape)))


def _read(checkpoint: TorchDistCheckpoint, name: str, place: Place) -> torch.Tensor:
    stored = checkpoint.tensors[name]
    rest = tuple(stored.size)[len(place) :]
    value = torch.empty(rest, dtype=stored.properties.dtype)
    offset = (*place, *(0 for _ in rest))
    checkpoint.read([Piece(name, tuple(stored.size), offset, value)])
    return value
