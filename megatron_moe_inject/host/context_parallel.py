"""Parts of sequences as Megatron lays them out over context-parallel ranks."""

from __future__ import annotations

import torch


def context_parallel_slice(states: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's part of full sequences, ``[k, s, h_t] -> [k, s/c, h_t]``.

    Megatron's zigzag layout (``get_batch_on_this_cp_rank``): of 2c equal pieces, rank r holds
    pieces r and 2c-1-r.
    """
    if size == 1:
        return states
    count, length, width = states.shape
    pieces = states.view(count, 2 * size, length // (2 * size), width)
    # Not by a list of indices, which would be copied to the device and waited for.
    halves = (pieces[:, rank], pieces[:, 2 * size - 1 - rank])
    return torch.stack(halves, 1).view(count, length // size, width)
