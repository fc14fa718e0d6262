"""The weights of a checkpoint, slice by slice, by names that two checkpoints share.

A GPT model and a hybrid model of the same weights store them under different names
(``host.gpt_names``). Seen from a GPT model, both have the same. A converted model has its norms
under both names that layers ask for (``host.norm_names``), as the same bytes; here each is one
tensor.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.gpt_names import (
    Place,
    pattern_of_names,
    stacked_axes,
    to_gpt,
    to_hybrid,
)
from megatron_moe_inject.host.layer_pattern import LayerPattern
from megatron_moe_inject.host.model_parts import is_own
from megatron_moe_inject.host.norm_names import other_name
from megatron_moe_inject.host.torch_dist import Piece, TorchDistCheckpoint


@dataclass(frozen=True)
class Stored:
    """A stored tensor: its shape, with the axes that number layers and experts, and its type."""

    size: tuple[int, ...]
    dtype: torch.dtype


class Weights:
    """What a checkpoint holds of a model, but for what the plugin added.

    Args:
        checkpoint: opened.

    Attributes:
        checkpoint: as given.
        pattern: of a hybrid model, ``None`` of a GPT model.
    """

    def __init__(self, checkpoint: TorchDistCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.pattern = pattern_of_names(checkpoint.tensors)
        self._as_gpt: LayerPattern | None = None
        self._wanted: Collection[str] = ()

    @property
    def layers(self) -> str | None:
        """The symbols that the layers in names are numbered by; ``None`` where they are blocks."""
        return None if self._as_gpt or self.pattern is None else self.pattern.symbols

    def as_gpt(self, problem: str) -> Weights:
        """The same by the names of a GPT model.

        Args:
            problem: why they are asked for, for the error.

        Raises:
            RecipeError: the model has layers that are no blocks.
        """
        if self.pattern is None:
            return self
        if self.pattern.blocks is None:
            raise self.error(f"{problem}, but {self.pattern.table()}", "name two of one kind")
        seen = Weights(self.checkpoint)
        seen._as_gpt = self.pattern
        return seen

    def named_like(self, names: Collection[str]) -> Weights:
        """The same, where a tensor has two names by the one that is among these."""
        seen = Weights(self.checkpoint)
        seen._as_gpt, seen._wanted = self._as_gpt, names
        return seen

    def error(self, problem: str, remedy: str) -> RecipeError:
        """An error that begins with the checkpoint."""
        return self.checkpoint.source.error(problem, remedy)

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """By name, each with its shape and type."""
        stored = {
            name: Stored(tuple(entry.size), entry.properties.dtype)
            for name, entry in self.checkpoint.tensors.items()
            if not is_own(name) and not self._is_second(name)
        }
        if self._as_gpt is None:
            return stored
        blocks = len(self._as_gpt.blocks or ())
        seen: dict[str, Stored] = {}
        for name, entry in stored.items():
            renamed = to_gpt(name, (), self._as_gpt)
            if renamed is None:
                seen[name] = entry
            else:
                in_gpt, place = renamed
                seen[in_gpt] = Stored((*((blocks,) if place else ()), *entry.size), entry.dtype)
        return seen

    def _is_second(self, name: str) -> bool:
        """Whether a stored name is the one of two that is not used: the wanted one is, or else
        that of a norm that lies in the linear layer behind it."""
        other = other_name(name)
        if other is None or other not in self.checkpoint.tensors:
            return False
        wanted, other_wanted = (self._seen(n) in self._wanted for n in (name, other))
        return other_wanted if wanted != other_wanted else ".layer_norm_" not in name

    def _seen(self, name: str) -> str:
        renamed = None if self._as_gpt is None else to_gpt(name, (), self._as_gpt)
        return name if renamed is None else renamed[0]

    def seen_at(self, name: str, place: Place) -> tuple[str, Place]:
        """The name and place here of a slice of the checkpoint's; the other way of ``place_of``.

        Raises:
            RecipeError: these names have none for it.
        """
        seen = (name, place) if self._as_gpt is None else to_gpt(name, place, self._as_gpt)
        if seen is None:
            raise self.error(f"has {name}, and a GPT model has no such layer", "name two of a kind")
        return seen

    def place_of(self, name: str, place: Place) -> tuple[str, Place]:
        """Where the checkpoint itself has a slice."""
        return (name, place) if self._as_gpt is None else to_hybrid(name, place, self._as_gpt)

    def places_of(self, name: str, place: Place) -> list[tuple[str, Place]]:
        """The same with the second name, where it has one."""
        stored, own_place = self.place_of(name, place)
        names = [stored, other_name(stored)]
        return [(n, own_place) for n in names if n is not None and n in self.checkpoint.tensors]

    def places(self, name: str) -> Iterator[Place]:
        """Places of a tensor's slices."""
        sizes = self.tensors[name].size[: stacked_axes(name)]
        return itertools.product(*(range(size) for size in sizes))

    def read(self, name: str, place: Place) -> torch.Tensor:
        """One slice. No collective."""
        name, place = self.place_of(name, place)
        stored = self.checkpoint.tensors[name]
        rest = tuple(stored.size)[len(place) :]
        target = torch.empty(rest, dtype=stored.properties.dtype)
        offset = (*place, *(0 for _ in rest))
        self.checkpoint.read([Piece(name, tuple(stored.size), offset, target)])
        return target

    def fingerprint(self) -> str:
        """SHA-256 of names, shapes and types."""
        tensors = self.named_like(()).tensors
        rows = sorted((name, stored.size, str(stored.dtype)) for name, stored in tensors.items())
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
