"""A step that can fail on some ranks fails on all of them or on none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_moe_inject.host.errors import (
    RecipeError,
)


def agree(action: Callable[[], Any]) -> Any:
    """Run a step that can fail on some ranks only, and fail on all or none.

    Collectives: one all-gather of error strings over the whole world.

    Raises:
        RecipeError: the first failing rank's message, on every rank.
    """
    result, error = None, None
    try:
        result = action()
    except RecipeError as failure:
        error = str(failure)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((message for message in errors if message is not None), None)
    if first is not None:
        raise RecipeError(first)
    return result


def on_first_rank(action: Callable[[], Any]) -> Any:
    """What ``action`` gives on the first rank, on every rank; it runs nowhere else.

    Collectives: those of ``agree`` and one broadcast of the result over the whole world.
    """
    result = [agree(lambda: action() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(result, src=0)
    return result[0]
