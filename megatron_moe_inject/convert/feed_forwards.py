"""The feed-forwards of a dense Hugging Face folder, from which new experts can begin."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_moe_inject.convert.architectures.table import Entry
from megatron_moe_inject.convert.arguments import megatron_arguments
from megatron_moe_inject.convert.folder_model import FolderModel
from megatron_moe_inject.convert.hf_folder import HfFolder

_PREFIX = "mlp."


class FolderFeedForwards:
    """See ``experts.grow.feed_forwards.FeedForwards``.

    Args:
        folder: opened.

    Raises:
        RecipeError: it cannot be converted, or has no dense feed-forward.
    """

    def __init__(self, folder: HfFolder) -> None:
        self._model = FolderModel.of(folder)
        self._entries: dict[tuple[int, str], Entry] = {}
        for entry in self._model.entries:
            name, layer = entry.slot.name, entry.slot.layer
            if layer is not None and name.startswith(f"{_PREFIX}linear_fc"):
                self._entries[layer, name.removeprefix(_PREFIX)] = entry
        self._numbers = sorted({layer for layer, _ in self._entries})
        if not self._numbers:
            raise folder.error("has no dense feed-forward", "name a dense model's folder")
        self.layers = len(self._numbers)
        self.args = megatron_arguments(self._model.flags, 1, torch.float32)

    def shape(self, layer: int, name: str) -> tuple[int, ...] | None:
        """See there."""
        entry = self._entries.get((self._numbers[layer], name))
        return None if entry is None else entry.shape

    def read(self, layer: int, name: str) -> torch.Tensor | None:
        """See there."""
        entry = self._entries.get((self._numbers[layer], name))
        return None if entry is None else self._model.joined(entry, self._model.dtype(entry))


def open_folder(flag: str, path: Path) -> FolderFeedForwards:
    """Those of a folder that a flag names.

    Raises:
        RecipeError: see ``FolderFeedForwards``.
    """
    return FolderFeedForwards(HfFolder.open(flag, path))
