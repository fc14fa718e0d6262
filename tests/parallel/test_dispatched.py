"""Numbers of tokens sent after the tokens, against what the tokens themselves say."""

import pytest
import torch
import torch.distributed as dist

from tests.harness import gloo
from tests.harness.moe_layer import BATCH, HIDDEN, LENGTH, moe_layer, random_tensor


@pytest.fixture(scope="module")
def processes():
    """Processes of their own: Megatron without a GPU is patched into them."""
    pool = gloo.Pool(4)
    yield pool
    pool.close()


def sent(dispatcher, capacity, pads, expert_parallel, tensor_parallel):
    """The first state of each token is its number; so that of each row that experts get is, too."""
    from megatron_moe_inject.adapters.dispatched import dispatched

    layer = moe_layer(
        expert_parallel, dispatcher, capacity, pads=pads, tensor_parallel=tensor_parallel
    )
    with torch.no_grad():
        layer.router.weight[:, 0] = 0.0  # numbers choose no expert
    states = random_tensor(50 + dist.get_rank(), LENGTH, BATCH, HIDDEN)
    numbers = torch.arange(LENGTH * BATCH) + 100 * dist.get_rank()
    states[..., 0] = numbers.view(LENGTH, BATCH)
    stock = layer.token_dispatcher.dispatch_postprocess
    kept = []

    def postprocess(*args):
        result = stock(*args)
        kept.append((result[0][:, 0], dispatched(layer.token_dispatcher, numbers, result[1])))
        return result

    layer.token_dispatcher.dispatch_postprocess = postprocess
    layer(states.requires_grad_())
    (rows, found) = kept[0]
    assert len(rows) > 0
    assert not found.requires_grad
    assert torch.equal(found, rows)
    return sorted({int(number) // 100 for number in rows.tolist()})


ALL, PADDED, DROPS = (None, False), (0.7, True), (0.7, False)
"""Capacity, and whether experts are filled up to it."""
ALONE, EP2, EP4, ETP2, BOTH = (1, 1), (2, 1), (4, 1), (1, 2), (2, 2)
"""Expert and tensor parallelism; gloo gathers no rows of unequal number over divided experts."""


@pytest.mark.parametrize(
    ("capacity", "sizes"),
    [
        *((ALL, ALONE), (ALL, EP2), (ALL, EP4), (ALL, ETP2)),
        *((PADDED, ALONE), (PADDED, EP2), (PADDED, BOTH), (DROPS, ALONE), (DROPS, EP4)),
    ],
)
def test_every_row_has_the_number_of_its_token(processes, capacity, sizes):
    senders = processes.run(sent, "alltoall", *capacity, *sizes)
    assert max(map(len, senders)) == sizes[0] * sizes[1]


@pytest.mark.parametrize("sizes", [ALONE, EP4, BOTH])
def test_so_it_has_where_all_tokens_are_gathered(processes, sizes):
    senders = processes.run(sent, "allgather", *ALL, *sizes)
    assert max(map(len, senders)) == sizes[0] * sizes[1]
