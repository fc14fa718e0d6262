"""What ranks agree on, and how few messages that takes."""

from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_moe_inject.data.labels import HostGroup
from megatron_moe_inject.host import agreement
from megatron_moe_inject.host.errors import RecipeError
from tests.harness import gloo

_OBJECTS = ("all_gather_object", "gather_object", "broadcast_object_list")


def told(action):
    """What ``action`` gives, and the collectives that it took, by name."""
    objects = Counter()

    def counting(name, stock):
        def call(*args, **kwargs):
            objects[name] += 1
            return stock(*args, **kwargs)

        return call

    stock = {name: getattr(dist, name) for name in _OBJECTS}
    stand_ins = {name: counting(name, function) for name, function in stock.items()}
    with mock.patch.multiple(dist, **stand_ins), gloo.count_collectives() as tensors:
        result = action()
    return result, dict(tensors + objects)


def failing(ranks):
    def action():
        if dist.get_rank() in ranks:
            raise RecipeError(f"rank {dist.get_rank()} has a mistake")
        return dist.get_rank()

    return action


def agreeing():
    rank = dist.get_rank()
    assert told(lambda: agreement.agree(failing(()))) == (rank, {"all_reduce": 1})
    with pytest.raises(RecipeError, match=r"^rank 1 has a mistake$"):
        agreement.agree(failing((1, 3)))
    result, messages = told(lambda: agreement.on_first_rank(lambda: {"of": dist.get_rank()}))
    assert (result, messages) == ({"of": 0}, {"all_reduce": 1, "broadcast_object_list": 1})


def reducing():
    rank, world = dist.get_rank(), dist.get_world_size()
    assert agreement.first_rank_with(rank > 0) == 1
    assert agreement.first_rank_with(False) is None
    assert told(lambda: agreement.union({rank, 9}, 10)) == (
        {*range(world), 9},
        {"all_reduce": 1},
    )
    assert agreement.union((), 3) == set()
    assert agreement.totals([rank, 1]) == [sum(range(world)), world]
    assert agreement.of_each_rank([rank, 7]) == [[r, 7] for r in range(world)]


def naming():
    rank = dist.get_rank()
    assert told(lambda: agreement.union_of_names(())) == (set(), {"all_reduce": 1})
    names = [f"rank {rank} lacks {i:02d}" for i in range(20)] if rank in (1, 2) else []
    expected = {f"rank {r} lacks {i:02d}" for r in (1, 2) for i in range(3)}
    assert agreement.union_of_names(names, at_most=3) == expected


def host_groups():
    """Two model-parallel groups of two ranks, among ranks that are in unequally many groups."""
    rank = dist.get_rank()
    group = gloo.block_group(2)
    dist.new_group([0, 3])
    host, messages = told(lambda: HostGroup.create(group))
    assert messages == {"all_gather_into_tensor": 1}
    assert dist.get_process_group_ranks(host.group) == [rank - rank % 2, rank - rank % 2 + 1]
    labels = torch.tensor([[rank, 5]])
    assert host.broadcast_labels(labels if rank % 2 == 0 else None, 1, 2).tolist() == [
        [rank - rank % 2, 5]
    ]
    assert HostGroup.create(gloo.block_group(1)) == HostGroup(None, rank)


@pytest.mark.parametrize("case", [agreeing, reducing, naming, host_groups])
def test_four_ranks(case):
    gloo.pool(4).run(case)
