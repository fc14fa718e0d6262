"""Trained values of a model: of a checkpoint saved at any layout, or of a delta.

Both know a slice by the name and place that Megatron stores it under (``naming``). What no part of
the model takes, and what is lacking, is an error by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_moe_inject.convert.folder_model import FolderModel
from megatron_moe_inject.convert.naming import Naming, Stored, numbers_layers
from megatron_moe_inject.convert.table import Entry, Slot
from megatron_moe_inject.experts.delta.delta import DeltaFolder, slice_checksum
from megatron_moe_inject.host.errors import RecipeError, listing
from megatron_moe_inject.host.gpt_names import pattern_of_names
from megatron_moe_inject.host.layer_pattern import LayerPattern
from megatron_moe_inject.host.model_parts import is_own
from megatron_moe_inject.host.norm_names import stored_name
from megatron_moe_inject.host.torch_dist import Piece, TorchDistCheckpoint

_MTP = "mtp."
_ANOTHER = "name the folder that its training began from"


class TrainedCheckpoint:
    """A checkpoint as ``exporting.Trained``.

    Args:
        checkpoint: opened.
        model: the folder that it is to become.

    Attributes:
        remarks: parts of the model that it does not hold.

    Raises:
        RecipeError: it is another model.
    """

    def __init__(self, checkpoint: TorchDistCheckpoint, model: FolderModel) -> None:
        self._checkpoint = checkpoint
        self._names = {name for name in checkpoint.tensors if not is_own(name)}
        by_layer = any(map(numbers_layers, self._names))
        naming = model.naming.seen_in(pattern_of_names(self._names), by_layer)
        if naming is None:
            raise self._other("has other layers", model)
        self._places: dict[Slot, tuple[str, Stored]] = {}
        self.remarks: list[str] = []
        self._find(model, naming)
        self._model = model

    def slice(self, entry: Entry) -> torch.Tensor | None:
        """See ``exporting.Trained``."""
        if entry.slot not in self._places:
            return None
        name, where = self._places[entry.slot]
        size = tuple(self._checkpoint.tensors[name].size)
        shape = entry.shape
        if entry.padded:
            shape = (min(entry.shape[0], size[0]), *entry.shape[1:])
        value = torch.empty(shape, dtype=self._checkpoint.tensors[name].properties.dtype)
        offset = (*where.place, *(0 for _ in shape))
        self._checkpoint.read([Piece(name, size, offset, value)])
        if shape == entry.shape:
            return value
        return torch.cat([value, self._model.joined(entry, value.dtype)[shape[0] :]])

    def _find(self, model: FolderModel, naming: Naming) -> None:
        """Where each slice is; every tensor is taken by one."""
        lacking, taken = [], set()
        for entry in model.entries:
            where = naming.stored(entry.slot)
            name = stored_name(where.names[0], self._names)
            if name not in self._names:
                lacking.append(where.names[0])
                continue
            taken.update(where.names)
            self._check_size(name, where, entry, model)
            self._places[entry.slot] = name, where
        depths = [name for name in lacking if name.startswith(_MTP)]
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

    def _check_size(self, name: str, where: Stored, entry: Entry, model: FolderModel) -> None:
        held = tuple(self._checkpoint.tensors[name].size)
        asked = (*where.axes, *entry.shape)
        if entry.padded and len(held) == len(asked) and held[1:] == asked[1:]:
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

    Attributes:
        remarks: none.

    Raises:
        RecipeError: it has slices that the model has not.
    """

    remarks: Sequence[str] = ()

    def __init__(self, delta: DeltaFolder, model: FolderModel) -> None:
        self._delta, self._model = delta, model
        slices = delta.index.slices
        layers = delta.index.layers
        pattern = None if layers is None else LayerPattern(layers)
        by_layer = any(numbers_layers(item.tensor) for item in slices.values())
        naming = model.naming.seen_in(pattern, by_layer)
        if naming is None:
            raise self._other("it has other layers")
        keys: dict[tuple[str, tuple[int, ...]], Slot] = {}
        for entry in model.entries:
            where = naming.stored(entry.slot)
            keys |= {(name, where.place): entry.slot for name in where.names}
        self._slices: dict[Slot, str] = {}
        unknown = []
        for key, item in slices.items():
            slot = keys.get((item.tensor, tuple(item.place)))
            if slot is None:
                unknown.append(f"{item.tensor} {item.place}" if item.place else item.tensor)
            else:
                self._slices[slot] = key
        if unknown:
            raise self._other(f"it holds {listing(unknown, 4)}, which no part of it takes")

    def slice(self, entry: Entry) -> torch.Tensor | None:
        """See ``exporting.Trained``."""
        key = self._slices.get(entry.slot)
        if key is None:
            return None
        value = self._delta.read(key)
        rows = value.shape[0] if entry.padded and value.dim() else None
        fits = tuple(value.shape) == entry.shape
        if entry.padded and rows is not None and rows >= entry.shape[0]:
            fits = tuple(value.shape[1:]) == entry.shape[1:]
        where = self._delta.index.slices[key]
        if not fits:
            raise self._other(
                f"it has {where.tensor} as {list(value.shape)} instead of {list(entry.shape)}"
            )
        base = self._model.joined(entry, value.dtype, rows)
        if slice_checksum(base) != where.base_sha256:
            raise self._other(f"its base held other values of {where.tensor} {where.place}")
        return value[: entry.shape[0]] if entry.padded else value

    def _other(self, problem: str) -> RecipeError:
        return self._delta.error(
            f"was not made from an import of {self._model.folder.path}: {problem}",
            "name the folder that its base was imported from",
        )
