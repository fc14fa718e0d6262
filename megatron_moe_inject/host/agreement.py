"""What the ranks of a job agree on, in messages that do not grow with their number.

A step that can fail on some ranks fails on all of them or on none. Flags, sets of small numbers and
sums are reduced; only where one rank has something to say does it say it. Objects of every rank on
every rank would cost a job of thousands of ranks their product
([examples/benchmarks](../../examples/benchmarks/README.md#messages-by-the-number-of-ranks)).
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject.host.errors import (
    RecipeError,
)


def agree(action: Callable[[], Any]) -> Any:
    """Run a step that can fail on some ranks only, and fail on all or none.

    Collectives: that of ``first_rank_with``; where a rank fails, one broadcast of its message.

    Raises:
        RecipeError: the first failing rank's message, on every rank.
    """
    result, error = None, None
    try:
        result = action()
    except RecipeError as failure:
        error = str(failure)
    first = first_rank_with(error is not None)
    if first is not None:
        message = [error]
        dist.broadcast_object_list(message, src=first)
        raise RecipeError(str(message[0]))
    return result


def on_first_rank(action: Callable[[], Any]) -> Any:
    """What ``action`` gives on the first rank, on every rank; it runs nowhere else.

    Collectives: those of ``agree`` and one broadcast of the result over the whole world.
    """
    result = [agree(lambda: action() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(result, src=0)
    return result[0]


def first_rank_with(flag: bool) -> int | None:
    """The lowest rank that has a flag set, ``None`` if none has.

    Collectives: one all-reduce of an int64 over the whole world.
    """
    world = dist.get_world_size()
    lowest = torch.tensor(dist.get_rank() if flag else world, device=collective_device())
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    first = int(lowest.item())
    return first if first < world else None


def union(members: Iterable[int], size: int) -> set[int]:
    """The numbers below ``size`` that any rank has.

    Collectives: one all-reduce of ``size`` bytes over the whole world.
    """
    flags = torch.zeros(size, dtype=torch.uint8)
    flags[list(members)] = 1
    flags = flags.to(collective_device())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return set(flags.nonzero().flatten().tolist())


def union_of_names(names: Iterable[str], at_most: int = 100) -> set[str]:
    """Names that any rank has, for an error.

    Args:
        names: of this rank; usually there are none anywhere, and then nothing more is sent.
        at_most: how many of a rank are sent.

    Collectives: that of ``first_rank_with``; where a rank has names, one all-gather of them.
    """
    own = sorted(names)[:at_most]
    if first_rank_with(bool(own)) is None:
        return set()
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return {name for rank in ranks for name in rank}


def totals(numbers: Sequence[int]) -> list[int]:
    """Sums over all ranks.

    Collectives: one all-reduce of an int64 for each number over the whole world.
    """
    sums = torch.tensor(numbers, dtype=torch.int64, device=collective_device())
    dist.all_reduce(sums)
    return sums.tolist()


def of_each_rank(numbers: Sequence[int]) -> list[list[int]]:
    """The numbers of every rank, by rank; all ranks have as many.

    Collectives: one all-gather of an int64 for each number over the whole world.
    """
    own = torch.tensor(numbers, dtype=torch.int64, device=collective_device())
    ranks = own.new_empty((dist.get_world_size() * len(numbers),))
    dist.all_gather_into_tensor(ranks, own)
    return ranks.view(-1, len(numbers)).tolist()


def host_twin(group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """A gloo group of the ranks of one of this rank's groups, ``None`` for one rank alone.

    Every rank of the world enters, each with its own group of one division of the world. Members
    could make theirs alone (``use_local_synchronization``), but before torch 2.14 each names it by
    how many groups it is in itself: where that differs, as at pipeline parallelism, they wait for
    each other for ever.

    Collectives: that of ``of_each_rank`` for one number; then one ``new_group`` for each group of
    the division, in which only its members connect.
    """
    own = dist.get_process_group_ranks(group)
    members: dict[int, list[int]] = {}
    for rank, (first,) in enumerate(of_each_rank([min(own)])):
        members.setdefault(first, []).append(rank)
    if max(map(len, members.values())) == 1:
        return None
    twin, _ = dist.new_subgroups_by_enumeration(list(members.values()), backend="gloo")
    assert isinstance(twin, dist.ProcessGroup), "this rank is one of the members"
    return twin if len(own) > 1 else None


def collective_device() -> torch.device:
    """Where tensors must lie for collectives over the whole world."""
    if "cpu" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


class HostWorld:
    """All ranks, over gloo: what is agreed in every step without a device, nor a wait for one.

    Args:
        timeout: how long ranks wait for the slowest.

    Collectives: one ``new_group`` of the whole world, none for one rank.
    """

    def __init__(self, timeout: datetime.timedelta) -> None:
        self._group: dist.ProcessGroup | None = None
        if dist.get_world_size() > 1:
            group = dist.new_group(backend="gloo", timeout=timeout)
            assert isinstance(group, dist.ProcessGroup), "every rank is a member"
            self._group = group

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of each number over all ranks, which have as many.

        Collectives: one all-reduce of a float64 for each number.
        """
        numbers = torch.tensor(values, dtype=torch.float64)
        if self._group is not None:
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self._group)
        return numbers.tolist()

    def said_by(self, rank: int, text: str | None) -> str:
        """What one rank says, on every rank.

        Collectives: one broadcast of it.
        """
        message = [text]
        if self._group is not None:
            dist.broadcast_object_list(
                message, src=rank, group=self._group, device=torch.device("cpu")
            )
        return str(message[0])
