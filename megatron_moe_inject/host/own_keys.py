"""Sharded tensors under keys of their own, so that some of a stack can be saved and read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory


def unstacked(tensor: ShardedTensor) -> ShardedTensor:
    """The same shard as part of a tensor without the axes stacked in front (layers, experts); what
    was stacked once more has the new axes' indices in front."""
    axes = tensor.prepend_axis_num
    if axes == 0:
        return tensor
    name, _, inner = tensor.key.partition("@")
    place = ".".join([*map(str, tensor.global_offset[:axes]), *([inner] if inner else [])])
    return replace(
        tensor,
        key=f"{name}@{place}",
        global_shape=tensor.global_shape[axes:],
        global_offset=tensor.global_offset[axes:],
        axis_fragmentations=tensor.axis_fragmentations[axes:],
        prepend_axis_num=0,
    )


def with_own_keys(state: Any) -> Any:
    """Unstack every tensor of a sharded state dict, also those that a factory builds later."""
    return changed_shards(
        state, lambda shard: unstacked(shard) if isinstance(shard, ShardedTensor) else shard
    )


def changed_shards(
    state: Any, change: Callable[[ShardedTensor | ShardedObject], ShardedTensor | ShardedObject]
) -> Any:
    """A sharded state dict with another shard for each, also for those that a factory builds
    later."""
    if isinstance(state, (ShardedTensor, ShardedObject)):
        return change(state)
    if isinstance(state, ShardedTensorFactory):
        build = state.build_fn
        return replace(state, build_fn=lambda *args: changed_shards(build(*args), change))
    if isinstance(state, dict):
        return {key: changed_shards(value, change) for key, value in state.items()}
    if isinstance(state, list):
        return [changed_shards(value, change) for value in state]
    return state
