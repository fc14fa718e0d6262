"""Tensors of the host on a device, without waiting for the device.

``.to(device)`` waits until all work before the copy is done, and so may ``non_blocking=True`` where
the memory is not pinned: CUDA stages such memory itself, and for more than 64 KiB it first lets the
stream run dry ("API synchronization behavior" in the documentation of CUDA's runtime; "Memory
copies from host to device of a memory block of 64 KB or less" in its programming guide). torch pins
from a pool and keeps the memory until the copy is done. A copy that also changes the type or the
strides is made in memory that is not pinned, so both are done before it or behind it.
"""

from __future__ import annotations

import torch

STAGED_BYTES = 64 * 1024
"""Up to as many CUDA copies aside at once, so that pinning would only cost."""


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``values`` on ``device``, copied in the order of its stream; itself, where it is there.

    What is handed in must not be changed afterwards.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.contiguous()
        if values.nbytes > STAGED_BYTES:
            values = values.pin_memory()
    return values.to(device, non_blocking=True)
