"""Parts of a checkpoint that new experts bring: copies of stored bytes, and values of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_moe_inject.experts.grow.moving import Moved
from megatron_moe_inject.experts.grow.starts import (
    MAIN_STATES,
    ZERO_STATES,
    NewRows,
    NewWeights,
)
from megatron_moe_inject.experts.grow.stored_names import ExpertName, Layer
from megatron_moe_inject.host.torch_dist_parts import NewPart


class NewParts:
    """Parts of new experts, and of grown routers.

    Args:
        moved: the old ones in their new places, which gets the new ones' copies too.
        weights, rows: how they begin.

    Attributes:
        parameters: of all new experts and their rows, once ``parts`` has ended.
    """

    def __init__(self, moved: Moved, weights: NewWeights, rows: NewRows) -> None:
        self._moved, self._weights, self._rows = moved, weights, rows
        self.parameters = 0

    def place_copies(self) -> None:
        """Let new experts that begin as copies have their donors' bytes, and objects."""
        moved, weights = self._moved, self._weights
        new = weights.numbering.new
        for item in moved.objects:
            for number, expert in enumerate(new):
                if item.expert == weights.donors[item.layer][number]:
                    target = MetadataIndex(item.moved(expert, moved.experts))
                    moved.placed[MetadataIndex(item.name)].append(target)
        for name in moved.tensors:
            if name.state in ZERO_STATES or not moved.whole(name):
                continue
            for part in moved.parts_of(name):
                layer, old = _layer_of(name, part.offset), _expert_of(name, part.offset)
                for number, expert in enumerate(new):
                    if weights.copied_from(layer, number) == old:
                        place = moved.place(part, name.of(expert), name.axis, expert)
                        moved.placed[part].append(place)
                        if name.axis is None:
                            moved.sizes[place.fqn] = moved.size(name)

    def parts(self) -> Iterator[NewPart]:
        """All that is not stored bytes, one at a time."""
        for name in self._moved.tensors:
            yield from self._zeros(name) if name.state in ZERO_STATES else self._values(name)
        yield from self._moved.new_parts(self._rows)
        self.parameters += self._count()

    def _count(self) -> int:
        """Parameters of the model that came."""
        moved, count = self._moved, len(self._weights.numbering.new)
        total = 0
        for name in (*moved.tensors, *moved.routers):
            bias = name.kind == "expert_bias"  # a buffer
            if bias or name.state is not None or name.expert not in (None, 0):
                continue
            size = math.prod(moved.size(name))
            each = size if name.axis is None else size // len(self._weights.numbering.moved)
            total += count * each
        return total

    def _experts(self, name: ExpertName) -> Iterator[tuple[tuple[int, ...], Layer]]:
        """Layers of a tensor; of one that is a single expert's, its own, once for each layer."""
        if name.axis is not None or name.expert == 0:
            yield from self._moved.layers(name)

    def _read(self, name: ExpertName, place: tuple[int, ...], expert: int) -> torch.Tensor:
        if name.axis is not None:
            return self._moved.read(name, (*place, expert))
        return self._moved.read(replace(name, name=name.of(expert), expert=expert), place)

    def _part(
        self, name: ExpertName, place: tuple[int, ...], number: int, value: torch.Tensor
    ) -> NewPart:
        expert = self._weights.numbering.new[number]
        at = place if name.axis is None else (*place, expert)
        target = name.of(expert)
        if name.axis is None:
            self._moved.sizes[target] = self._moved.size(name)
        offset = (*at, *(0 for _ in value.shape))
        return NewPart([(target, offset)], value.reshape((*(1 for _ in at), *value.shape)))

    def _zeros(self, name: ExpertName) -> Iterator[NewPart]:
        """The optimizer's state of all new experts: the same zeros."""
        places: list[tuple[str, tuple[int, ...]]] = []
        value = None
        for place, _ in self._experts(name):
            for number in range(len(self._weights.numbering.new)):
                if value is None:
                    value = torch.zeros_like(self._read(name, place, 0))
                part = self._part(name, place, number, value)
                places += part.places
        if value is not None:
            yield NewPart(places, part.value)

    def _values(self, name: ExpertName) -> Iterator[NewPart]:
        """New experts that are no copy of stored bytes."""
        main = self._main(name)
        for place, layer in self._experts(name):
            copies = [
                self._weights.copied_from(layer, n) for n in range(len(self._weights.numbering.new))
            ]
            if not self._moved.whole(name):
                for number, donor in enumerate(copies):
                    if donor is not None:
                        yield self._part(name, place, number, self._read(name, place, donor))

            def read(expert: int, place: tuple[int, ...] = place) -> torch.Tensor:
                return self._read(main, place, expert)

            dtype = self._moved.checkpoint.tensors[name.name].properties.dtype
            for number, value in self._weights.values(main, layer, read):
                yield self._part(name, place, number, value.to(dtype))

    def _main(self, name: ExpertName) -> ExpertName:
        """The optimizer's copy of a model's tensor in higher precision, if it is kept: values of
        both must agree."""
        if name.state is not None:
            return name
        for other in self._moved.tensors:
            if other.state in MAIN_STATES and other.key == name.key:
                return other
        return name


def _layer_of(name: ExpertName, offset: Sequence[int] | None) -> Layer:
    assert offset is not None, name
    return name.layer(offset[0] if name.layers_axis else 0)


def _expert_of(name: ExpertName, offset: Sequence[int] | None) -> int:
    assert offset is not None, name
    if name.expert is not None:
        return name.expert
    assert name.axis is not None, name
    return int(offset[name.axis])
