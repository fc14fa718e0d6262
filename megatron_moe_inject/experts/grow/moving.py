"""Where a checkpoint's parts go when its experts get other ids, or some of them leave."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_moe_inject.experts.grow.stored_names import (
    ExpertName,
    ExpertObject,
    Layer,
    expert_name,
    expert_object,
    is_of_optimizer,
    state_of,
    unknown_names,
)
from megatron_moe_inject.host.errors import listing
from megatron_moe_inject.host.torch_dist import COMMON_OBJECT, Piece, TorchDistCheckpoint
from megatron_moe_inject.host.torch_dist_parts import NewPart

RouterChange = Callable[[ExpertName, Layer, torch.Tensor], torch.Tensor]
"""Gives a router's tensor ``[E', ...]`` of a layer from its old one ``[E, ...]``."""


@dataclass
class Moved:
    """A checkpoint's parts in their new places.

    Args:
        checkpoint: with those tensors that are to be kept (``with_training_state``).
        target: by id before the id afterwards, ``None`` of an expert that leaves.
        experts: of a layer, afterwards.
        keeps: whether a stored name is kept at all.

    Attributes:
        placed, sizes: see ``torch_dist_parts.rearranged_copy``.
        tensors: those of experts.
        routers: those of routers, which are written anew.
        objects: those of experts.

    Raises:
        RecipeError: tensors of experts or routers that are not known here.
    """

    checkpoint: TorchDistCheckpoint
    target: Sequence[int | None]
    experts: int
    keeps: Callable[[str], bool]
    placed: dict[MetadataIndex, list[MetadataIndex]] = field(default_factory=dict)
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tensors: list[ExpertName] = field(default_factory=list)
    routers: list[ExpertName] = field(default_factory=list)
    objects: list[ExpertObject] = field(default_factory=list)

    def __post_init__(self) -> None:
        stored = self.checkpoint.metadata.state_dict_metadata
        kept = [name for name in stored if name != COMMON_OBJECT and self.keeps(name)]
        unknown = unknown_names(kept)
        if unknown:
            raise self.checkpoint.source.error(
                f"holds {listing(unknown, 4)}, which belong to experts or routers and are not "
                "known here",
                "save the checkpoint with SequentialMLP or TEGroupedMLP experts, without FSDP",
            )
        kinds = {name: expert_name(name) for name in kept}
        objects = {name: expert_object(name) for name in kept}
        for name in kept:
            known, of_expert = kinds[name], objects[name]
            if of_expert is not None:
                self.objects.append(of_expert)
            elif known is not None and isinstance(stored[name], TensorStorageMetadata):
                (self.tensors if known.kind == "expert" else self.routers).append(known)
                self._resize(known)
        for part in self.checkpoint.metadata.storage_data:
            if part.fqn in objects:
                places = self._places(part, kinds[part.fqn], objects[part.fqn])
                if places:
                    self.placed[part] = places

    def _resize(self, name: ExpertName) -> None:
        size = list(self.size(name))
        if name.axis is None:
            return
        assert size[name.axis] == len(self.target), (name.name, size)
        size[name.axis] = self.experts
        self.sizes[name.name] = tuple(size)

    def _places(
        self, part: MetadataIndex, name: ExpertName | None, of_expert: ExpertObject | None
    ) -> list[MetadataIndex]:
        """Where a stored part goes; nowhere, where it has to be written anew."""
        if of_expert is not None:
            target = self.target[of_expert.expert]
            return [] if target is None else [MetadataIndex(of_expert.moved(target, self.experts))]
        if name is None:
            return [part]
        if name.kind != "expert":
            return []
        if name.axis is None:
            assert name.expert is not None, name
            target = self.target[name.expert]
            return [] if target is None else [self.place(part, name.of(target))]
        first = self._together(part, name)
        return [] if first is None else [self.place(part, name.name, name.axis, first)]

    @staticmethod
    def place(
        part: MetadataIndex, name: str, axis: int | None = None, expert: int = 0
    ) -> MetadataIndex:
        """A part's place under another name, or with another expert on an axis."""
        assert part.offset is not None, part
        offset = list(part.offset)
        if axis is not None:
            offset[axis] = expert
        return MetadataIndex(name, torch.Size(offset))

    def _together(self, part: MetadataIndex, name: ExpertName) -> int | None:
        """The first id of a part's experts afterwards, ``None`` where they do not stay together."""
        begin, count = self._range(part, name)
        targets = self.target[begin : begin + count]
        first = targets[0]
        if first is None or list(targets) != list(range(first, first + count)):
            return None
        return first

    def _range(self, part: MetadataIndex, name: ExpertName) -> tuple[int, int]:
        """A part's first expert, and how many it has."""
        assert part.offset is not None, part
        assert name.axis is not None, name
        return part.offset[name.axis], self._shape(part)[name.axis]

    def _shape(self, part: MetadataIndex) -> tuple[int, ...]:
        if part.fqn not in self._shapes:
            self._shapes[part.fqn] = {
                tuple(chunk.offsets): tuple(chunk.sizes)
                for chunk in self.checkpoint.tensors[part.fqn].chunks
            }
        assert part.offset is not None, part
        return self._shapes[part.fqn][tuple(part.offset)]

    _shapes: dict[str, dict[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def size(self, name: ExpertName) -> tuple[int, ...]:
        """Of a stored tensor, before."""
        return tuple(self.checkpoint.tensors[name.name].size)

    def layers(self, name: ExpertName) -> Iterator[tuple[tuple[int, ...], Layer]]:
        """Indices on the first axis, if that numbers layers, each with its layer."""
        if not name.layers_axis:
            yield (), name.layer()
            return
        for index in range(self.size(name)[0]):
            yield (index,), name.layer(index)

    def read(self, name: ExpertName, place: tuple[int, ...]) -> torch.Tensor:
        """A slice of a stored tensor, with all axes behind ``place``."""
        stored = self.checkpoint.tensors[name.name]
        rest = tuple(stored.size)[len(place) :]
        value = torch.empty(rest, dtype=stored.properties.dtype)
        offset = (*place, *(0 for _ in rest))
        self.checkpoint.read([Piece(name.name, tuple(stored.size), offset, value)])
        return value

    def whole(self, name: ExpertName) -> bool:
        """Whether every stored part of a tensor is of one expert."""
        axis = name.axis
        return axis is None or all(
            chunk.sizes[axis] == 1 for chunk in self.checkpoint.tensors[name.name].chunks
        )

    def parts_of(self, name: ExpertName) -> list[MetadataIndex]:
        """The stored parts of a tensor."""
        return [
            MetadataIndex(name.name, torch.Size(chunk.offsets))
            for chunk in self.checkpoint.tensors[name.name].chunks
        ]

    def new_parts(self, change: RouterChange) -> Iterator[NewPart]:
        """Parts that are no stored bytes: those of experts that do not stay together, and routers.

        Raises:
            RecipeError: they cannot be read.
        """
        for name in self.tensors:
            if name.axis is not None and not self.whole(name):
                yield from self._separated(name)
        for name in self.routers:
            for place, layer in self.layers(name):
                value = change(name, layer, self.read(name, place))
                assert value.shape[0] == self.experts, (name.name, value.shape)
                shape = (*(1 for _ in place), *value.shape)
                offset = (*place, *(0 for _ in value.shape))
                yield NewPart([(name.name, offset)], value.reshape(shape))

    def _separated(self, name: ExpertName) -> Iterator[NewPart]:
        axis = name.axis
        assert axis is not None, name
        for part in self.parts_of(name):
            if self._together(part, name) is not None:
                continue
            begin, count = self._range(part, name)
            value = torch.empty(
                self._shape(part), dtype=self.checkpoint.tensors[name.name].properties.dtype
            )
            assert part.offset is not None, part
            self.checkpoint.read([Piece(name.name, self.size(name), tuple(part.offset), value)])
            for number, expert in enumerate(range(begin, begin + count)):
                target = self.target[expert]
                if target is not None:
                    offset = list(part.offset)
                    offset[axis] = target
                    yield NewPart([(name.name, tuple(offset))], value.narrow(axis, number, 1))


def known_optimizer(checkpoint: TorchDistCheckpoint, states: Collection[str]) -> bool | None:
    """Whether the optimizer's state is stored by parameter, in states that are known; ``None``
    where there is none.

    Args:
        checkpoint: with its training state.
        states: those that are.
    """
    stored = [n for n in checkpoint.metadata.state_dict_metadata if is_of_optimizer(n)]
    if not stored:
        return None
    for name in stored:
        of = state_of(name)
        tensors = checkpoint.tensors
        if of is None or of[0] not in states or name not in tensors or of[1] not in tensors:
            return False
        if tensors[name].size != tensors[of[1]].size:
            return False
    return True
