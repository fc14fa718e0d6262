"""The combined output of chosen experts of a real Megatron MoE layer, against brute force."""

import functools

import pytest
import torch
import torch.distributed as dist

from tests.harness import gloo
from tests.harness.moe_layer import BATCH, EXPERTS, HIDDEN, LENGTH, TOPK, moe_layer, random_tensor

CHOSEN = frozenset({1, 2})


@pytest.fixture(scope="module")
def processes():
    """Processes of their own: Megatron without a GPU is patched into them."""
    pool = gloo.Pool(2)
    yield pool
    pool.close()


def _combined(expert_parallel, dispatcher, capacity=None):
    """Combined output of the chosen experts, and the gradients of its weighted sum."""
    from megatron_moe_inject.teachers.imitation.hook import _ExpertOutputs

    layer = moe_layer(expert_parallel, dispatcher, capacity)
    kept = {}

    def finish(output, combined):
        kept["all"], kept["chosen"] = combined(frozenset(range(EXPERTS))), combined(CHOSEN)
        return output

    _ExpertOutputs(layer, finish, lambda: True)
    states = random_tensor(50 + dist.get_rank(), LENGTH, BATCH, HIDDEN).requires_grad_()
    output, _ = layer(states)
    assert torch.equal(kept["all"], output), "the second combine differs from the first"
    (kept["chosen"] * random_tensor(9, *output.shape)).sum().backward()
    gradients = {
        expert: [p.grad for p in layer.experts.local_experts[local].parameters()]
        for local, expert in enumerate(layer.local_expert_indices)
    }
    return states.detach(), kept["chosen"].detach(), states.grad, gradients


@functools.cache
def _brute_force(rank):
    """One matrix product per token and expert, no dispatcher."""
    states = random_tensor(50 + rank, LENGTH, BATCH, HIDDEN).requires_grad_()
    weights = {
        e: (random_tensor(e, 24, HIDDEN), random_tensor(100 + e, HIDDEN, 12))
        for e in range(EXPERTS)
    }
    for pair in weights.values():
        for weight in pair:
            weight.requires_grad_()
    scores = states @ random_tensor(7, EXPERTS, HIDDEN).t()
    top, ids = scores.topk(TOPK, dim=-1)
    probs = top.softmax(-1)
    output = torch.zeros(LENGTH, BATCH, HIDDEN)
    for expert in CHOSEN:
        first, second = weights[expert]
        gate, up = (states @ first.t()).chunk(2, dim=-1)
        result = (torch.nn.functional.gelu(gate) * up) @ second.t()
        share = (probs * (ids == expert)).sum(-1, keepdim=True)
        output = output + share * result
    (output * random_tensor(9, *output.shape)).sum().backward()
    return output.detach(), states.grad, {e: [w.grad for w in pair] for e, pair in weights.items()}


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_the_output_of_chosen_experts_is_that_of_brute_force(
    processes, dispatcher, expert_parallel
):
    results = processes.run(_combined, expert_parallel, dispatcher)
    for rank, (_, output, gradient, _) in enumerate(results):
        expected, expected_gradient, _ = _brute_force(rank)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)
    for expert in range(EXPERTS):
        ours = [found[3][expert] for found in results if expert in found[3]]
        theirs = [_brute_force(rank)[2][expert] for rank in range(2)]
        for n in range(2):
            if expert not in CHOSEN:
                assert all(not g[n].any() for g in ours), "a frozen-out expert got a gradient"
                continue
            total = sum(g[n] for g in ours)
            torch.testing.assert_close(total, sum(g[n] for g in theirs), rtol=1e-5, atol=1e-5)


def test_padding_to_capacity_leaves_dropped_tokens_zero(processes):
    """With all room they need nothing is dropped; with less some outputs are exactly zero."""
    for _, output, _, _ in processes.run(_combined, 2, "alltoall", 2.0):
        assert output.shape == (LENGTH, BATCH, HIDDEN)
    wide = processes.run(_combined, 1, "alltoall", 2.0)
    for rank, (_, output, _, _) in enumerate(wide):
        torch.testing.assert_close(output, _brute_force(rank)[0], rtol=1e-5, atol=1e-5)
    narrow = processes.run(_combined, 1, "alltoall", 0.5)
    reached = sum(int((output != 0).any(-1).sum()) for _, output, _, _ in narrow)
    everywhere = sum(int((output != 0).any(-1).sum()) for _, output, _, _ in wide)
    assert 0 < reached < everywhere
