"""The safetensors files of a delta: numbered, of bounded size, written as tensors come."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


class DeltaFiles:
    """Writes tensors by name; what is held in memory is one file.

    Args:
        folder: where the files go.
        most: bytes of a file, but for a tensor that is larger by itself.

    Attributes:
        bytes: of all tensors so far.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._most = folder, most
        self._batch: dict[str, torch.Tensor] = {}
        self._size, self._number = 0, 1
        self.bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> str:
        """Write a tensor, at the latest by ``close``; returns the name of its file.

        Raises:
            OSError: the disk is full, say.
        """
        if self._batch and self._size + tensor.nbytes > self._most:
            self.close()
            self._number += 1
        self._batch[name] = tensor.contiguous()
        self._size += tensor.nbytes
        self.bytes += tensor.nbytes
        return self._name

    def close(self) -> None:
        """Write what is held.

        Raises:
            OSError: the disk is full, say.
        """
        try:
            save_file(self._batch, self._folder / self._name)
        except SafetensorError as error:  # no space left, say
            raise OSError(str(error)) from error
        self._batch, self._size = {}, 0

    @property
    def _name(self) -> str:
        return f"delta-{self._number:05d}.safetensors"
