"""From a trained checkpoint, or a delta, back to a Hugging Face folder.

The folder that the model came from is written anew, with the values that training changed. What is
bitwise what an import of it gives goes through as it is stored, codes and scales of FP8 and MXFP4
included. One slice is in memory at a time; of what is put together of several tensors those that
wait for their turn, at most ``_WAITING_BYTES``.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_moe_inject.convert.architectures.table import Entry
from megatron_moe_inject.convert.folder_model import FolderModel
from megatron_moe_inject.convert.grown_folder import CARD, card_text
from megatron_moe_inject.convert.hf_writer import Outcome, Quantized, Written, write_like
from megatron_moe_inject.host.new_experts import NewExperts

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
_WAITING_BYTES = 1 << 30


class Trained(Protocol):
    """Values of the model after training."""

    @property
    def remarks(self) -> Sequence[str]:
        """What the user should know of it."""
        ...

    def slice(self, entry: Entry) -> torch.Tensor | None:
        """Megatron's slice, without rows that pad a vocabulary; ``None`` where it is known to be
        what an import of the folder gives.

        Raises:
            RecipeError: it cannot be read, or was made from another folder.
        """
        ...


@dataclass(frozen=True)
class Row:
    """Tensors of one name, but for its numbers.

    Attributes:
        tensors, changed: how many there are, and changed.
        storage: of what changed.
        largest, mean: largest of their roundings (``hf_writer.Outcome``).
    """

    tensors: int = 0
    changed: int = 0
    storage: str = ""
    largest: float = 0.0
    mean: float = 0.0

    def __add__(self, outcome: Outcome) -> Row:
        if not outcome.changed:
            return Row(self.tensors + 1, self.changed, self.storage, self.largest, self.mean)
        return Row(
            self.tensors + 1,
            self.changed + 1,
            outcome.storage,
            max(self.largest, outcome.largest),
            max(self.mean, outcome.mean),
        )


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        rows: by name with ``*`` for numbers.
        written: by tensor.
        remarks: of the source.
    """

    rows: Mapping[str, Row]
    written: Written
    remarks: Sequence[str]


def export_folder(
    model: FolderModel,
    trained: Trained,
    output: Path,
    *,
    quantized: Quantized = "keep",
    card: NewExperts | None = None,
    progress: Progress,
) -> Exported:
    """Write the folder with trained values. No collective.

    Args:
        model: the folder that the student was imported from.
        trained: what training made of it.
        output: must not exist; appears whole or not at all.
        quantized: what is quantised stays so, or the quantisation is dropped.
        card: of new experts, which is written beside.
        progress: wraps the folder's tensors to show how far it is.

    Raises:
        RecipeError: of either side, see ``Trained`` and ``write_like``.
    """
    _check_following(model, trained)
    values = _Values(model, trained)
    written = write_like(
        model.folder,
        output,
        values,
        quantized=quantized,
        beside={} if card is None else {CARD: card_text(card)},
        progress=progress,
    )
    rows: dict[str, Row] = {}
    for name, outcome in written.tensors.items():
        kind = re.sub(r"\b\d+\b", "*", name)
        rows[kind] = rows.get(kind, Row()) + outcome
    return Exported(rows, written, trained.remarks)


def _check_following(model: FolderModel, trained: Trained) -> None:
    """RecipeError where training changed one of two slices that the folder keeps as one tensor."""
    shared = {part for entry in model.entries if entry.follows for part in entry.parts}
    for entry in model.entries:
        if not shared & set(entry.parts):
            continue
        new = trained.slice(entry)
        if new is not None and not same_bytes(new, model.joined(entry, new.dtype)):
            name = entry.parts[0].name
            raise model.folder.error(
                f"keeps {name} once, which Megatron has as several tensors, and training changed "
                f"{entry.slot.name} alone",
                "train neither embedding nor output_layer of this architecture",
            )


class _Values:
    """New values by the names of the folder's tensors; see ``write_like``."""

    def __init__(self, model: FolderModel, trained: Trained) -> None:
        self._model, self._trained = model, trained
        self._takers: dict[str, list[tuple[int, int]]] = {}
        for number, entry in enumerate(model.entries):
            for at, part in enumerate(() if entry.follows else entry.parts):
                self._takers.setdefault(part.name, []).append((number, at))
        self._unchanged: set[int] = set()
        self._waiting: OrderedDict[int, dict[int, torch.Tensor | None]] = OrderedDict()

    def __call__(self, name: str) -> torch.Tensor | None:
        whole: torch.Tensor | None = None
        for number, at in self._takers.get(self._model.copies.get(name, name), ()):
            part = self._model.entries[number].parts[at]
            new = self._part(number, at)
            if not part.index:
                return new
            if new is None:
                continue
            if whole is None:
                whole = self._model.folder.read(part.name, (), new.dtype)
            whole[part.index] = new
        return whole

    def _part(self, number: int, at: int) -> torch.Tensor | None:
        """New values of one part; those of the entry's others wait for their turn."""
        if number in self._unchanged:
            return None
        parts = self._waiting.pop(number, {})
        if at not in parts:
            parts = self._compared(self._model.entries[number])
            if all(new is None for new in parts.values()):
                self._unchanged.add(number)
                return None
        part = parts.pop(at)
        if parts:
            self._waiting[number] = parts
        while len(self._waiting) > 1 and self._waiting_bytes() > _WAITING_BYTES:
            self._waiting.popitem(last=False)  # read again when it is asked for
        return part

    def _waiting_bytes(self) -> int:
        waiting = (part for parts in self._waiting.values() for part in parts.values())
        return sum(part.nbytes for part in waiting if part is not None)

    def _compared(self, entry: Entry) -> dict[int, torch.Tensor | None]:
        """New values by part, ``None`` for each that is what the folder holds."""
        new = self._trained.slice(entry)
        if new is None:
            return dict.fromkeys(range(len(entry.parts)))
        changed: dict[int, torch.Tensor | None] = dict(enumerate(entry.form.split(new)))
        if entry.slot in self._model.absent:
            return changed
        for old in imported(self._model, entry, new.dtype):
            if same_bytes(new, old):
                return dict.fromkeys(changed)
            for at, part in enumerate(entry.form.split(old)):
                now = changed[at]
                if now is not None and same_bytes(now, part):
                    changed[at] = None
        return changed


def imported(model: FolderModel, entry: Entry, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """What an import of a folder gives for a slice, in the type of a checkpoint.

    Quantised weights mean more digits than the type that they are imported in by default, so that
    a run in float32 may have begun from either.
    """
    yield model.joined(entry, dtype)
    own = model.dtype(entry)
    if own != dtype and any(model.folder.storage(part.name) != "plain" for part in entry.parts):
        yield model.joined(entry, own).to(dtype)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape and type are the same bit for bit."""
    return torch.equal(as_bytes(one), as_bytes(other))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """So that NaN equals itself and 0.0 differs from -0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
