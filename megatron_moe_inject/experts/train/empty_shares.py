"""Ranks of a distributed optimizer whose share of a bucket holds no parameter.

Megatron (0.18.2 to 0.19.2) cuts each bucket of gradients into equal shares, aligned and padded, one
for a rank. Where little trains, some shares are padding alone: one norm, or a few rows of routers.
Such a run trains, and its first save in the default format (``dp_reshardable``) stops at an
assertion ("empty bucket encountered"), since the share's padding is stored with the dtypes of a
parameter that is not there. Here the other ranks say which state a parameter has. What lies within
the stored length is then written as the padding that it is, as at the end of any other share, and
what lies beyond it is not written; neither is read into anything.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject.experts.train.uses import SHARE_SHARDS, SHARE_STATE
from megatron_moe_inject.host.megatron_types import Optimizer
from megatron_moe_inject.host.wrap import Call, wrap_method


def has_empty_share(optimizer: Optimizer) -> bool:
    """Whether some rank of a ``DistributedOptimizer``, not only this one, has such a share. No
    collective: every rank knows how all of them are cut."""
    ranks = optimizer.data_parallel_group.size()
    for buffer in optimizer.buffers:
        for bucket in buffer.buckets:
            size = bucket.grad_data.numel() // ranks
            used: set[int] = set()
            for parameter in bucket.params:
                start, end, _ = buffer.param_index_map[parameter]
                first, last = start - bucket.offset, end - bucket.offset - 1
                used.update(range(first // size, last // size + 1))
            if len(used) < ranks:
                return True
    return False


class EmptyShares:
    """Lets a ``DistributedOptimizer`` with such shares be saved and loaded; changed in place.

    Collectives: none here; each later ``sharded_state_dict`` in the format ``dp_reshardable`` adds
    one all-gather of a few names over the optimizer's data-parallel group.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        wrap_method(optimizer, SHARE_STATE, self._state)
        wrap_method(optimizer, SHARE_SHARDS, self._shards)

    def _state(self, call: Call) -> dict[Any, Any]:
        """Stock's state, with a place of length 0 in each share without a parameter."""
        state = call()
        buckets = [
            (share, bucket.grad_data.device)
            for index, buffer in enumerate(self._optimizer.buffers)
            for shares in state[index].values()
            for share, bucket in zip(shares, buffer.buckets, strict=True)
        ]
        local_dtypes = next((_dtypes(share[0]) for share, _ in buckets if share), None)
        group = self._optimizer.data_parallel_group
        ranks: list[Any] = [None] * group.size()
        dist.all_gather_object(ranks, local_dtypes, group=group)
        dtypes = next(share for share in ranks if share is not None)
        for share, device in buckets:
            if not share:
                nothing = {k: torch.empty(0, dtype=d, device=device) for k, d in dtypes.items()}
                share.append(
                    nothing | {"gbuf_local_start": 0, "gbuf_local_end": 0, "padding": True}
                )
        return state

    def _shards(self, call: Call) -> dict[Any, Any]:
        """Stock's sharded state, without those places; where a share has nothing else, one that
        says that it is padding stays."""
        state = call()
        for index in range(len(self._optimizer.buffers)):
            for buckets in state[index].values():
                for share in buckets:
                    places = [
                        {k: v for k, v in place.items() if getattr(v, "local_shape", None) != (0,)}
                        for place in share
                    ]
                    share[:] = [place for place in places if len(place) > 1] or places
        return state


def _dtypes(tensors: dict[str, Any]) -> dict[str, torch.dtype]:
    """Of one parameter's main copy and optimizer state; a step is no part of the bucket."""
    return {k: v.dtype for k, v in tensors.items() if torch.is_tensor(v) and k != "step"}
