"""A Hugging Face folder with more experts than its files hold: what an export of new ones is like.

The tables say what the folder's tensors are called before and after: an old expert's are the same
bytes under its new number, a new expert's have none yet, and of tensors with an axis of experts
(routers, gpt-oss's experts) the old rows are where they have moved to. New tensors stand in the
files of the layer's first expert, at the end, stored in the way that its own are. The number of
experts in ``config.json`` is the new one; all other keys stay, how many are chosen too.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_moe_inject.convert.architectures.forms import Same
from megatron_moe_inject.convert.architectures.table import Entry, Slot
from megatron_moe_inject.convert.folder_model import FolderModel
from megatron_moe_inject.convert.hf_folder import HfFolder
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.new_experts import NewExperts, read_card
from megatron_moe_inject.host.safetensors_file import SafetensorsFile, StoredTensor, header_of
from megatron_moe_inject.host.safetensors_folder import read_json

CARD = "inject_new_experts.json"
"""The card of new experts in a folder, which an import of it gives the checkpoint again."""


@dataclass(frozen=True)
class _Source:
    """Where a logical tensor of the grown folder comes from.

    Attributes:
        old: of the folder as it is: the same values, those of old experts, or one that is like it.
        kind: ``same``, ``rows`` (the first axis numbers experts) or ``new``.
    """

    old: str
    kind: str


def grown(model: FolderModel, card: NewExperts) -> FolderModel:
    """The folder as it is to be once it has the new experts of a card.

    Args:
        model: the folder that the checkpoint's base was imported from.
        card: of as many old experts.

    Raises:
        RecipeError: the table does not say where the number of experts stands.
    """
    architecture, config = model.architecture, copy.deepcopy(model.config)
    key = architecture.experts_key
    if key is None:
        raise model.folder.error(
            f"is a {config.model_type} model, whose table does not say which key of config.json is "
            "the number of experts",
            "export it without new experts (moe-inject remove-experts)",
        )
    setattr(config, key, card.experts)
    entries = tuple(architecture.entries(config))
    sources, absent = _sources(model, entries, card)
    before = model.folder
    read = copy.deepcopy(before.config)
    setattr(read, key, card.experts)
    keys = _keys(before.config, key) & before.json.keys() or {key}
    json_of = {**before.json, **dict.fromkeys(keys, card.experts)}
    folder = before.seen_as(_GrownFiles(before, sources, card), json_of, read)
    return dataclasses.replace(FolderModel.of(folder), absent=absent)


def _sources(
    model: FolderModel, entries: tuple[Entry, ...], card: NewExperts
) -> tuple[dict[str, _Source], frozenset[Slot]]:
    """By name of the grown folder; and slots of which the folder as it is has not all values."""
    before = {entry.slot: entry for entry in model.entries}
    old_id = {now: old for old, now in enumerate(card.moved)}
    sources = {name: _Source(name, "same") for name in (*model.copies, *model.leftovers)}
    absent: set[Slot] = set()
    for entry in entries:
        slot, kind = entry.slot, "same"
        if slot.expert is not None:
            is_new = slot.expert not in old_id
            kind = "new" if is_new else "same"
            slot = dataclasses.replace(slot, expert=old_id.get(slot.expert, 0))
        old = before[slot]
        if entry.shape != old.shape:
            assert isinstance(entry.form, Same), f"{slot} has rows of experts"
            kind = "rows"
        if kind != "same":
            absent.add(entry.slot)
        for part, old_part in zip(entry.parts, old.parts, strict=True):
            sources[part.name] = _Source(old_part.name, "rows" if part.index else kind)
    return sources, frozenset(absent)


class _GrownFiles:
    """The folder's files as they are to be; what they hold is read from those that there are.

    Attributes:
        files, file_of: see ``TensorFiles``.
    """

    def __init__(self, before: HfFolder, sources: Mapping[str, _Source], card: NewExperts) -> None:
        self._before, self._card = before.files, card
        self._stored_from: dict[str, tuple[str, str]] = {}
        self.files: dict[str, SafetensorsFile] = {}
        self.file_of: dict[str, SafetensorsFile] = {}
        by_old: dict[str, list[str]] = {}
        for name, source in sources.items():
            by_old.setdefault(source.old, []).append(name)
        for at, file in before.files.files.items():
            tensors: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
            added: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
            for stored in file.tensors.values():
                logical, ending = before.logical(stored.name)
                for name in by_old[logical]:
                    kind = sources[name].kind
                    self._stored_from[name + ending] = (stored.name, kind)
                    first = (card.experts,) if kind == "rows" else stored.shape[:1]
                    entry = (name + ending, stored.dtype, (*first, *stored.shape[1:]))
                    (added if kind == "new" else tensors).append(entry)
            header, placed = header_of([*tensors, *added], file.metadata)
            size = len(header) + sum(tensor.bytes for tensor in placed.values())
            self.files[at] = SafetensorsFile(file.path, header, file.metadata, placed, size)
            self.file_of |= dict.fromkeys(placed, self.files[at])

    def stored(self, name: str) -> StoredTensor:
        """What the header says of a tensor."""
        return self.file_of[name].tensors[name]

    def read(self, name: str, index: tuple[int, ...] = ()) -> torch.Tensor:
        """A tensor or its slice, as it is stored; zeros of what is new."""
        old, kind = self._stored_from[name]
        moved = self._card.moved
        if kind == "same":
            return self._before.read(old, index)
        if kind == "rows" and index and index[0] in moved:
            return self._before.read(old, (moved.index(index[0]), *index[1:]))
        stored = self.stored(name)
        bytes_there = torch.zeros(stored.bytes, dtype=torch.uint8).view(stored.dtype)
        value = bytes_there.view(stored.shape)[index]
        if kind == "rows" and not index:
            rows = self._before.read(old)
            for row, now in enumerate(moved):
                value[now] = rows[row]
        return value

    def chunks(self, name: str) -> Iterator[memoryview]:
        """A tensor's bytes, of one that is the folder's."""
        old, kind = self._stored_from[name]
        assert kind == "same", f"{name} has values that are not the folder's"
        yield from self._before.chunks(old)


def _keys(config: Any, key: str) -> set[str]:
    """All names of a key of a configuration."""
    mapped = config.attribute_map
    own = mapped.get(key, key)
    return {own, key, *(name for name, target in mapped.items() if target == own)}


def with_new_experts(model: FolderModel, card: NewExperts | None) -> FolderModel:
    """The folder as a checkpoint with this card is exported to it: grown, unless it already is.

    Raises:
        RecipeError: it has another number of experts than the card knows.
    """
    experts = model.naming.experts
    if card is None or experts == card.experts:
        return model
    if experts != card.base_experts:
        raise model.folder.error(
            f"has {experts} experts in a layer, and new ones were added to {card.base_experts}",
            "name the folder that the base was imported from",
        )
    return grown(model, card)


def card_text(card: NewExperts) -> bytes:
    """What ``CARD`` holds."""
    return (json.dumps(card.plain(), indent=1) + "\n").encode()


def card_of(folder: HfFolder) -> NewExperts | None:
    """The card in a folder, ``None`` without one.

    Raises:
        RecipeError: it is damaged, or of another number of experts than the folder has.
    """
    if not (folder.path / CARD).exists():
        return None
    plain = read_json(folder.path, CARD, folder.error)
    try:
        return read_card(plain)
    except RecipeError as error:
        raise folder.error(
            f"holds {CARD}, a card of new experts {error}", "take that file out of it"
        ) from None
