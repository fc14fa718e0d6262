"""What is allocated while a block runs on meta tensors: now, at most, and what is left.

Every storage that an operation makes is counted once, when it appears, and taken off when nothing
holds it any more, as a GPU's caching allocator counts it (``torch.cuda.memory_allocated``).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Allocations(TorchDispatchMode):
    """Counts storages on meta while it is entered.

    Args:
        known: tensors that are there already and count nothing, such as parameters.

    Attributes:
        now: bytes that are held.
        peak: the most that was held.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held: dict[int, tuple[int, weakref.ref[Any] | None]] = {}
        self._keep = [tensor.untyped_storage() for tensor in known]
        for storage in self._keep:
            self._held[storage._cdata] = (0, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self.add(tensor)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor that came from elsewhere, such as another stage."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        size = storage.nbytes()
        self._held[key] = (size, weakref.ref(storage, lambda _: self._drop(key)))
        self.now += size
        self.peak = max(self.peak, self.now)

    def forget_peak(self) -> None:
        """Let ``peak`` count from now on."""
        self.peak = self.now

    def _drop(self, key: int) -> None:
        size, _ = self._held.pop(key, (0, None))
        self.now -= size


class Saved:
    """Bytes that autograd saves, each storage once: pack hook of ``saved_tensors_hooks``.

    Args:
        known: tensors that are there already and count nothing.

    Attributes:
        bytes: of all that was saved.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._there: dict[int, weakref.ref[Any]] = {}
        self.bytes = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Note a tensor and hand it back; its storage is not kept."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known and key not in self._there:
            self._there[key] = weakref.ref(storage, lambda _: self._there.pop(key, None))
            self.bytes += storage.nbytes()
        return tensor

    def __contains__(self, tensor: torch.Tensor) -> bool:
        """Whether its storage was saved and is still there."""
        return tensor.untyped_storage()._cdata in self._there
