"""A Hugging Face folder seen as Megatron's model: its slices, its options, each tensor used once.

Everything is held against the files' headers before a byte of weights is read: each tensor that the
table names is there with the shape that it implies, and each tensor of the folder is named once, a
known copy of one that is, or a known leftover.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_moe_inject.convert.architectures import architecture_of
from megatron_moe_inject.convert.architectures.table import Architecture, Entry, Part, Slot
from megatron_moe_inject.convert.hf_folder import HfFolder
from megatron_moe_inject.convert.naming import Naming, naming_of
from megatron_moe_inject.host.errors import RecipeError, listing

_LEFTOVERS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Buffers that old files hold and that follow from the configuration."""


@dataclass(frozen=True)
class FolderModel:
    """A folder whose architecture is known and whose tensors are accounted for.

    Attributes:
        folder: opened.
        architecture: its table.
        config: of what it holds, which the table takes.
        flags: Megatron's options of the model.
        naming: how Megatron stores it.
        entries: every slice.
        copies: tensors that must equal another, by name, of those that the folder holds.
        leftovers: tensors that say nothing.
        absent: slots of which the folder has not all values (``grown_folder``).
    """

    folder: HfFolder
    architecture: Architecture
    config: Any
    flags: Mapping[str, Any]
    naming: Naming
    entries: Sequence[Entry]
    copies: Mapping[str, str]
    leftovers: Sequence[str]
    absent: Collection[Slot] = ()

    @classmethod
    def of(cls, folder: HfFolder) -> FolderModel:
        """See a folder as a model.

        Raises:
            RecipeError: no table has its architecture, or its tensors are not those of its
                configuration.
        """
        try:
            architecture = architecture_of(folder.config)
            config = architecture.for_folder(folder.config, folder.names)
            architecture.check(config)
        except RecipeError as error:
            raise folder.error("cannot be converted", str(error)) from None
        flags = dict(architecture.flags(config))
        entries = tuple(architecture.entries(config))
        copies = {c: name for c, name in architecture.copies(config).items() if c in folder}
        leftovers = _account(folder, entries, copies)
        naming = naming_of(flags, architecture.stacked_layers(config))
        return cls(folder, architecture, config, flags, naming, entries, copies, leftovers)

    def dtype(self, entry: Entry) -> torch.dtype:
        """Of a slice that keeps the folder's precision: the widest of its parts."""
        dtype = self.folder.dtype(entry.parts[0].name)
        for part in entry.parts[1:]:
            dtype = torch.promote_types(dtype, self.folder.dtype(part.name))
        return dtype

    def joined(self, entry: Entry, dtype: torch.dtype, rows: int | None = None) -> torch.Tensor:
        """Megatron's slice: its parts, rounded to ``dtype`` and put together.

        Args:
            rows: of a vocabulary, to which zeros are added.

        Raises:
            RecipeError: a file cannot be read.
        """
        parts = [self.folder.read(part.name, part.index, dtype) for part in entry.parts]
        whole = entry.form.join(parts)
        if not entry.padded or rows is None or rows == whole.shape[0]:
            return whole
        padding = whole.new_zeros((rows - whole.shape[0], *whole.shape[1:]))
        return torch.cat([whole, padding])

    def check_copies(self) -> Iterator[str]:
        """Compare each copy with what it must equal; gives their names.

        Raises:
            RecipeError: one differs.
        """
        for copy, original in self.copies.items():
            if not torch.equal(self.folder.read(copy), self.folder.read(original)):
                raise self.folder.error(
                    f"holds other values of {copy} than of {original}, which its configuration "
                    "ties to it",
                    "take the folder as it was published, or set config.json's "
                    "tie_word_embeddings as the model was trained",
                )
            yield copy


def _account(
    folder: HfFolder, entries: Sequence[Entry], copies: Mapping[str, str]
) -> tuple[str, ...]:
    """Hold entries and tensors against each other; returns leftovers.

    Raises:
        RecipeError: naming what is missing, left over, or of another shape.
    """
    taken: dict[str, set[tuple[int, ...]]] = {}
    missing: list[str] = []
    slots = set()
    for entry in entries:
        assert entry.slot not in slots, f"{entry.slot} stands in the table twice"
        slots.add(entry.slot)
        shapes = _part_shapes(entry)
        for part, shape in zip(entry.parts, shapes, strict=True):
            if part.name not in folder:
                missing.append(part.name)
                continue
            _check_shape(folder, part, shape, entry)
            if entry.follows:
                continue
            indices = taken.setdefault(part.name, set())
            assert part.index not in indices, f"{part} is used twice"
            indices.add(part.index)
    if missing:
        raise folder.error(
            f"lacks {len(missing)} tensors of a {folder.config.model_type} model of its config: "
            f"{listing(dict.fromkeys(missing), 4)}",
            "copy it whole, or set config.json right",
        )
    for name, indices in taken.items():
        axes = len(next(iter(indices)))
        count = torch.Size(folder.shape(name)[:axes]).numel()
        if len(indices) != count:
            raise folder.error(
                f"has {count} slices in {name}, of which the configuration knows {len(indices)}",
                "set config.json right",
            )
    known = taken.keys() | copies.keys()
    rest = [name for name in folder.names if name not in known]
    leftovers = tuple(name for name in rest if _LEFTOVERS.search(name))
    unknown = [name for name in rest if name not in leftovers]
    if unknown:
        raise folder.error(
            f"holds {len(unknown)} tensors that no part of a {folder.config.model_type} model of "
            f"its config takes: {listing(unknown, 4)}",
            "set config.json right, or leave them out if the model does without",
        )
    return leftovers


def _part_shapes(entry: Entry) -> list[tuple[int, ...]]:
    """The shapes of the parts that make up an entry's slice."""
    whole = torch.empty(entry.shape, device="meta")
    return [tuple(part.shape) for part in entry.form.split(whole)]


def _check_shape(folder: HfFolder, part: Part, shape: tuple[int, ...], entry: Entry) -> None:
    stored = folder.shape(part.name)
    held = stored[len(part.index) :]
    inside = all(i < size for i, size in zip(part.index, stored, strict=False))
    if held != shape or not inside:
        index = f" at {list(part.index)}" if part.index else ""
        raise folder.error(
            f"has {part.name} as {list(stored)}, where the sizes of its config ask for "
            f"{list(shape)}{index} ({entry.slot.name} of Megatron's)",
            "set config.json right, or take the folder whose weights these are",
        )
