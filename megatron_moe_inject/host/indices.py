"""Positions that the host knows, as an index on a device, without waiting for the device.

Indexing a CUDA tensor with a list makes torch copy the list and wait for the device.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from megatron_moe_inject.host.to_device import to_device


def index(positions: Iterable[int], device: torch.device) -> torch.Tensor:
    """``[n]`` int64 on ``device``, copied in the order of its stream."""
    return to_device(torch.tensor(list(positions), dtype=torch.int64), device)
