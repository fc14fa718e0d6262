"""Rows of a teacher's experts filled up for FP8: multiples of 16, and the same results."""

import pytest
import torch
import torch.distributed as dist

from megatron_moe_inject.host.model_parts import decoder_layers
from tests.harness import gloo
from tests.harness.moe_layer import BATCH, EXPERTS, HIDDEN, LENGTH, moe_layer, random_tensor

MULTIPLE = 16


@pytest.fixture(scope="module")
def processes():
    """Processes of their own: Megatron without a GPU is patched into them."""
    pool = gloo.Pool(2)
    yield pool
    pool.close()


def multiply_row_by_row(linear, numbers, weights):
    """Let a layer's products depend on nothing but the row, in the numbers that it has, and keep
    how many rows each of its experts gets."""

    def forward(rows, splits=None):
        splits = [len(rows)] if splits is None else splits
        numbers.extend(splits)
        parts = zip(rows.split(splits), weights, strict=True)
        products = [weight @ row for part, weight in parts for row in part]
        return torch.stack(products or [rows.new_zeros(weights[0].shape[:1])])[: len(rows)], None

    linear.forward = forward


def linears(experts, grouped):
    """The linear layers of an experts module, with the weights that each multiplies by."""
    if not grouped:
        for expert in experts.local_experts:
            yield from ((fc, [fc.weight]) for fc in (expert.linear_fc1, expert.linear_fc2))
        return
    for fc in (experts.linear_fc1, experts.linear_fc2):
        yield fc, [getattr(fc, f"weight{i}") for i in range(fc.num_gemms)]


@torch.no_grad()
def filled(grouped, expert_parallel, busy):
    """Rows of each product before and after, and whether the layer's results are the same bits.

    Args:
        busy: experts that tokens may choose; the others get none.
    """
    from megatron_moe_inject.teachers.expert_rows import fill_up_experts

    layer = moe_layer(expert_parallel, "alltoall", None, grouped=grouped)
    layer.router.weight[:, 0] = torch.tensor([0.0 if e in busy else -1e3 for e in range(EXPERTS)])
    numbers = []
    for linear, weights in linears(layer.experts, grouped):
        multiply_row_by_row(linear, numbers, weights)
    states = random_tensor(50 + dist.get_rank(), LENGTH, BATCH, HIDDEN)
    states[..., 0] = 1.0
    stock, _ = layer(states)
    before = list(numbers)
    numbers.clear()
    model = torch.nn.Module()
    model.decoder = torch.nn.Module()
    model.decoder.layers = torch.nn.ModuleList([torch.nn.Module()])
    model.decoder.layers[0].mlp = layer
    assert decoder_layers(model)
    fill_up_experts(model, MULTIPLE)
    ours, _ = layer(states)
    return before, numbers, torch.equal(stock, ours), float(stock.abs().max())


@pytest.mark.parametrize("grouped", [False, True], ids=["one by one", "grouped"])
@pytest.mark.parametrize("expert_parallel", [1, 2])
@pytest.mark.parametrize("busy", [(0, 1, 2, 3), (0, 1)], ids=["all", "a rank without tokens"])
def test_experts_get_multiples_and_give_the_same(processes, grouped, expert_parallel, busy):
    of_ranks = processes.run(filled, grouped, expert_parallel, busy)
    for before, after, same, largest in of_ranks:
        assert same
        assert largest > 0
        assert any(number % MULTIPLE for number in before) or not any(before)
        assert len(after) == len(before)
        for own, number in zip(before, after, strict=True):
            assert number == max(1, -(-own // MULTIPLE)) * MULTIPLE
    rows = [number for before, *_ in of_ranks for number in before]
    assert (0 in rows) == (len(busy) < EXPERTS)
