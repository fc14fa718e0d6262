"""Positions that the host knows, as an index on a device, without waiting for the device.

Indexing a CUDA tensor with a list makes torch copy the list and wait for the device.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def index(positions: Iterable[int], device: torch.device) -> torch.Tensor:
    """``[n]`` int64 on ``device``, copied in the order of its stream."""
    host = torch.tensor(list(positions), dtype=torch.int64)
    return host.to(device, non_blocking=True)
