"""Trained values of a model: of a checkpoint saved at any layout, or of a delta.

Both know a slice by the name and place that Megatron stores it under (``naming``). What no part of
the model takes, and what is lacking, is an error by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_moe_inject.convert.architectures.table import Entry, Slot
from megatron_moe_inject.convert.folder_model import FolderModel
from megatron_moe_inject.convert.naming import Naming, Stored, numbers_layers, pieces_of
from megatron_moe_inject.convert.tokenizer import compare_tokenizers
from megatron_moe_inject.experts.delta.adapters import new_rows, products
from megatron_moe_inject.experts.delta.grown import most_experts, most_experts_of
from megatron_moe_inject.experts.delta.index import (
    Adapted,
    DeltaFolder,
    NewRows,
    Slice,
    slice_checksum,
)
from megatron_moe_inject.host.domain_choice import NOTHING_CHOSEN, DomainChoice
from megatron_moe_inject.host.errors import RecipeError, listing
from megatron_moe_inject.host.gpt_names import pattern_of_names
from megatron_moe_inject.host.layer_pattern import LayerPattern
from megatron_moe_inject.host.low_rank import Rounding, merge, rounded
from megatron_moe_inject.host.model_parts import is_own
from megatron_moe_inject.host.norm_names import stored_name
from megatron_moe_inject.host.open_door import refuse_half_open
from megatron_moe_inject.host.stored_adapters import refuse_adapters
from megatron_moe_inject.host.torch_dist import Piece, TorchDistCheckpoint

_MTP = "mtp."
_ANOTHER = "name the folder that its training began from"


class TrainedCheckpoint:
    """A checkpoint as ``exporting.Trained``.

    Args:
        checkpoint: opened.
        model: the folder that it is to become.
        adapters_apart: whether the caller takes care of the adapters that it may hold.

    Attributes:
        naming: how it names the slices of the model.
        remarks: parts of the model that it does not hold; how its tokenizer differs.

    Raises:
        RecipeError: it is another model, of another tokenizer, or holds adapters.
    """

    def __init__(
        self, checkpoint: TorchDistCheckpoint, model: FolderModel, *, adapters_apart: bool = False
    ) -> None:
        if not adapters_apart:
            refuse_adapters(checkpoint.tensors, checkpoint.source.error)
        refuse_half_open(checkpoint, checkpoint.source.error)
        self._checkpoint = checkpoint
        self._names = {name for name in checkpoint.tensors if not is_own(name)}
        experts = most_experts_of({name: checkpoint.tensors[name] for name in self._names})
        if experts > model.naming.experts > 0:
            raise checkpoint.source.error(
                f"has {experts} experts in a layer, and {model.folder.path} has "
                f"{model.naming.experts}",
                "name as --hf the folder that moe-inject export-hf makes of what add-experts wrote",
            )
        by_layer = any(map(numbers_layers, self._names))
        naming = model.naming.seen_in(pattern_of_names(self._names), by_layer)
        if naming is None:
            raise self._other("has other layers", model)
        self.naming = naming
        self._places: dict[Slot, list[tuple[str, Stored]]] = {}
        self.remarks: list[str] = []
        self._find(model, naming)
        self.remarks += compare_tokenizers(model.folder, checkpoint)
        self._model = model

    def slice(self, entry: Entry) -> torch.Tensor | None:
        """See ``exporting.Trained``."""
        places = self._places.get(entry.slot)
        if places is None:
            return None
        pieces = [self._read(entry, name, where) for name, where in places]
        value = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        rows = value.shape[0] if entry.padded else entry.shape[0]
        if rows == entry.shape[0]:
            return value
        return torch.cat([value, self._model.joined(entry, value.dtype)[rows:]])

    def _read(self, entry: Entry, name: str, where: Stored) -> torch.Tensor:
        """A piece of a slice, without rows that pad a vocabulary."""
        stored = self._checkpoint.tensors[name]
        size = tuple(stored.size)
        shape = size[len(where.axes) :]
        if entry.padded:
            shape = (min(entry.shape[0], shape[0]), *shape[1:])
        value = torch.empty(shape, dtype=stored.properties.dtype)
        offset = (*where.place, *(0 for _ in shape))
        self._checkpoint.read([Piece(name, size, offset, value)])
        return value

    def _find(self, model: FolderModel, naming: Naming) -> None:
        """Where each slice is; every tensor is taken by one."""
        lacking: list[str] = []
        taken: set[str] = set()
        for entry in model.entries:
            places = []
            for where, rows in pieces_of(entry, naming.stored(entry.slot)):
                name = stored_name(where.names[0], self._names)
                if name not in self._names:
                    lacking.append(where.names[0])
                    continue
                taken.update(where.names)
                self._check_size(name, where, _shape(entry, rows), entry.padded, model)
                places.append((name, where))
            if places:
                self._places[entry.slot] = places
        depths = [name for name in lacking if name.startswith(_MTP)]
        if depths and model.absent:
            raise self._checkpoint.source.error(
                "has new experts and no layers of multi-token prediction, which "
                f"{model.folder.path} has and which would lack them",
                "add experts to a checkpoint that has these layers, or take them out of the folder",
            )
        if depths and not any(name.startswith(_MTP) for name in self._names):
            self.remarks.append(
                "it holds no layers of multi-token prediction: they are the folder's"
            )
            lacking = [name for name in lacking if not name.startswith(_MTP)]
        if lacking:
            raise self._other(f"lacks {listing(dict.fromkeys(lacking), 4)}", model)
        rest = sorted(self._names - taken)
        if rest:
            raise self._other(f"holds {listing(rest, 4)}, which no part of it takes", model)

    def _check_size(
        self,
        name: str,
        where: Stored,
        shape: tuple[int, ...],
        padded: bool,
        model: FolderModel,
    ) -> None:
        held = tuple(self._checkpoint.tensors[name].size)
        asked = (*where.axes, *shape)
        if padded and len(held) == len(asked) and held[1:] == asked[1:]:
            rows = asked[0] - held[0]
            if rows > 0:
                self.remarks.append(
                    f"it has {held[0]} of {asked[0]} rows of {name}: the last {rows} are the "
                    "folder's"
                )
            return
        if held != asked:
            raise self._other(f"has {name} as {list(held)} instead of {list(asked)}", model)

    def _other(self, problem: str, model: FolderModel) -> RecipeError:
        return self._checkpoint.source.error(
            f"is not the {model.folder.config.model_type} model of {model.folder.path}: it "
            f"{problem}",
            _ANOTHER,
        )


class TrainedDelta:
    """A delta, applied to what an import of the folder gives, as ``exporting.Trained``.

    Each of its slices says what the base held there; that must be what the folder holds.

    Args:
        delta: opened.
        model: the folder that the delta's base was imported from.
        choice: of which domains adapters are merged, where each has its own.

    Attributes:
        remarks: none.

    Raises:
        RecipeError: it has slices that the model has not, or adapters of which none or others are
            chosen.
    """

    remarks: Sequence[str] = ()

    def __init__(
        self, delta: DeltaFolder, model: FolderModel, choice: DomainChoice = NOTHING_CHOSEN
    ) -> None:
        self._delta, self._model, self._choice = delta, model, choice
        choice.check(
            [] if delta.index.adapters is None else delta.index.adapters.domains, delta.error
        )
        card = delta.index.new_experts
        self._moved = [] if card is None else card.moved
        slices = delta.index.slices
        layers = delta.index.layers
        pattern = None if layers is None else LayerPattern(layers)
        tensors = [item.tensor for item in slices.values()]
        tensors += [] if delta.index.adapters is None else delta.index.adapters.dtypes
        by_layer = any(map(numbers_layers, tensors))
        naming = model.naming.seen_in(pattern, by_layer)
        if naming is None:
            raise self._other("it has other layers")
        if most_experts(delta.index) > model.naming.experts:
            raise delta.error(
                f"has {most_experts(delta.index)} experts or more in a layer, and "
                f"{model.folder.path} has {model.naming.experts}: its base had new ones already",
                "export that base to a folder (moe-inject export-hf) and name this as --hf, or "
                "make a delta against the checkpoint before moe-inject add-experts",
            )
        keys: dict[tuple[str, tuple[int, ...]], tuple[Slot, slice]] = {}
        adapters = delta.index.adapters
        for entry in model.entries:
            for where, rows in pieces_of(entry, naming.stored(entry.slot)):
                keys |= {(name, where.place): (entry.slot, rows) for name in where.names}
        self._slices: dict[Slot, list[tuple[str, slice]]] = {}
        unknown = []
        for key, item in slices.items():
            taker = keys.get((item.tensor, tuple(item.place)))
            if taker is None:
                unknown.append(_text(item))
            else:
                self._slices.setdefault(taker[0], []).append((key, taker[1]))
        self._adapted: dict[Slot, Adapted] = {}
        self._rows: dict[Slot, NewRows] = {}
        for matrix in () if adapters is None else adapters.matrices:
            taker = keys.get((matrix.tensor, tuple(matrix.place)))
            if taker is None or taker[0] in self._adapted:
                unknown.append(f"adapters of {_text(matrix)}")
            else:
                self._adapted[taker[0]] = matrix
        for vocabulary in () if adapters is None else adapters.rows:
            taker = keys.get((vocabulary.tensor, ()))
            if taker is None or taker[0] in self._rows:
                unknown.append(f"rows of {vocabulary.tensor}")
            else:
                self._rows[taker[0]] = vocabulary
        if unknown:
            raise self._other(f"it holds {listing(unknown, 4)}, which no part of it takes")
        lacking = [str(slot) for slot in model.absent if slot not in self._slices]
        if lacking:
            raise delta.damaged(f"lacks {listing(lacking, 4)} of its new experts")

    def slice(self, entry: Entry) -> torch.Tensor | None:
        """See ``exporting.Trained``."""
        matrix, rows = self._adapted.get(entry.slot), self._rows.get(entry.slot)
        adapted = matrix or rows
        if adapted is None:
            return self._replaced(entry)
        whole = self._model.joined(entry, self._dtype(adapted.tensor))
        if matrix is not None:
            self._check(whole, matrix.base_sha256, _text(matrix))
            changes = products(self._delta, matrix, tuple(whole.shape), self._choice)
            merge(whole, changes, Rounding())
        if rows is not None:
            new = new_rows(self._delta, rows, tuple(whole.shape))
            self._check(whole[rows.ids], rows.base_sha256, f"rows of {rows.tensor}")
            whole[rows.ids] = rounded(new.double(), whole.dtype)
        return whole

    def _dtype(self, tensor: str) -> torch.dtype:
        """Of the delta's base."""
        adapters = self._delta.index.adapters
        name = None if adapters is None else adapters.dtypes.get(tensor)
        dtype = getattr(torch, name or "", None)
        if not isinstance(dtype, torch.dtype):
            raise self._delta.damaged(f"has adapters of {tensor} in the type {name!r}")
        return dtype

    def _check(self, old: torch.Tensor, sha256: str, text: str) -> None:
        if slice_checksum(old) != sha256:
            raise self._other(f"its base held other values of {text}")

    def _replaced(self, entry: Entry) -> torch.Tensor | None:
        """With the slices of the delta; ``None`` where it has none."""
        changes = self._slices.get(entry.slot)
        if changes is None:
            return None
        values = {key: self._delta.read(key) for key, _ in changes}
        (dtype,) = {value.dtype for value in values.values()}
        rows_held = values[changes[0][0]].shape[0] if entry.padded else 0
        whole = self._model.joined(entry, dtype, max(rows_held, entry.shape[0]))
        for key, rows in changes:
            item, value = self._delta.index.slices[key], values[key]
            old = whole[rows] if entry.pieces else whole
            if value.shape != old.shape:
                raise self._other(
                    f"it has {_text(item)} as {list(value.shape)} instead of {list(old.shape)}"
                )
            if entry.slot not in self._model.absent:
                self._check(old, item.base_sha256, _text(item))
            elif entry.slot.expert is None:
                self._check(old[self._moved], item.base_sha256, _text(item))
            old.copy_(value)
        return whole[: entry.shape[0]] if entry.padded else whole

    def _other(self, problem: str) -> RecipeError:
        return self._delta.error(
            f"was not made from an import of {self._model.folder.path}: {problem}",
            "name the folder that its base was imported from",
        )


def _shape(entry: Entry, rows: slice) -> tuple[int, ...]:
    """Of a piece of an entry's slice."""
    if not entry.pieces:
        return entry.shape
    return (rows.stop - rows.start, *entry.shape[1:])


def _text(item: Slice | Adapted) -> str:
    return f"{item.tensor} {item.place}" if item.place else item.tensor
