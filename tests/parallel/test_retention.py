"""Expert-output retention of a real Megatron MoE layer against brute force, and L2 by hand."""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_moe_inject.host.attached_loss import (
    take_terms,
)
from megatron_moe_inject.host.labels import (
    GENERAL,
)
from tests.harness import gloo
from tests.harness.moe_layer import BATCH, EXPERTS, HIDDEN, LENGTH, TOPK, moe_layer, random_tensor

TRAINED = (1, 2)
WEIGHT = 3.0
LABELS = {
    "both ranks": ((GENERAL, 0), (GENERAL, GENERAL)),
    "one rank": ((0, GENERAL), (0, 0)),
    "nobody": ((0, 0), (0, 0)),
}


@pytest.fixture(scope="module")
def processes():
    """Processes of their own: Megatron without a GPU is patched into them."""
    pool = gloo.Pool(2)
    yield pool
    pool.close()


class _Chunk(torch.nn.Module):
    """One MoE layer as a model chunk, recomputed in the backward pass if asked."""

    def __init__(self, moe, recompute):
        super().__init__()
        self.config = moe.config
        self.decoder = torch.nn.Module()
        layer = torch.nn.Module()
        layer.layer_number, layer.mlp = 1, moe
        self.decoder.layers = torch.nn.ModuleList([layer])
        self._recompute = recompute

    def forward(self, states):
        run = self.decoder.layers[0].mlp
        if self._recompute:
            return torch.utils.checkpoint.checkpoint(
                lambda x: run(x)[0], states, use_reentrant=True
            )
        return run(states)[0]


def _moved(expert, n, shape):
    """How far a parameter of an expert that trains is from its start."""
    return 0.3 * random_tensor(1000 * n + expert, *shape)


def _held(expert_parallel, dispatcher, labels, recompute=False, capacity=None, moved=True):
    """What is reported, and all gradients of the retention alone."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_moe_inject.experts.train.freeze import FreezePolicy
    from megatron_moe_inject.retention.experts import ExpertRetention
    from megatron_moe_inject.retention.originals import OriginalParameters

    chunk = _Chunk(moe_layer(expert_parallel, dispatcher, capacity), recompute)
    moe = chunk.decoder.layers[0].mlp
    FreezePolicy({0: frozenset(TRAINED)}, frozenset({"router"})).apply([chunk])
    originals = OriginalParameters([chunk], {}, ["experts"])
    own = {e: moe.experts.local_experts[i] for i, e in enumerate(moe.local_expert_indices)}
    with torch.no_grad():
        for expert in own.keys() & set(TRAINED) if moved else ():
            for n, parameter in enumerate(own[expert].parameters()):
                parameter += _moved(expert, n, parameter.shape)
    states = random_tensor(50 + dist.get_rank(), LENGTH, BATCH, HIDDEN).requires_grad_()
    plain = chunk(states).detach()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    retention = ExpertRetention([chunk], groups, originals, lambda iteration: WEIGHT)
    retention.begin(torch.tensor([labels[dist.get_rank()]]), 0, LENGTH)
    output = chunk(states)
    assert torch.equal(output, plain), "what the layer computes has changed"
    (output * 0).sum().backward()
    reports = [{}]
    retention.end(reports)
    assert torch.equal(chunk(states), plain)
    assert not states.grad.any(), "the states learn from it"
    assert not moe.router.weight.grad.any(), "the router learns from it"
    gradients = {e: [p.grad for p in expert.parameters()] for e, expert in own.items()}
    (name,), (value,) = take_terms(reports)
    assert name == "expert retention"
    return value, gradients


def _fused_on(rank):
    """What retention says where this rank's layer has a parameter of all its experts."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_moe_inject.host.errors import RecipeError
    from megatron_moe_inject.retention.experts import ExpertRetention
    from megatron_moe_inject.retention.originals import OriginalParameters

    chunk = _Chunk(moe_layer(2, "alltoall", None), recompute=False)
    originals = OriginalParameters([chunk], {}, ["experts"])
    if dist.get_rank() == rank:
        fused = torch.nn.Parameter(torch.zeros(2, HIDDEN))
        chunk.decoder.layers[0].mlp.experts.register_parameter("weight1", fused)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    try:
        ExpertRetention([chunk], groups, originals, lambda iteration: WEIGHT)
    except RecipeError as error:
        return str(error)
    return None


def test_experts_in_one_parameter_are_an_error_on_every_rank(processes):
    assert processes.run(_fused_on, None) == [None, None]
    message, again = processes.run(_fused_on, 1)
    assert message == again
    assert message.startswith("retention.experts: holds each expert to its own outputs, but layer")
    assert "layer 0 keeps its experts in one parameter (decoder.layers.0.mlp.experts." in message


@functools.cache
def _brute_force(labels):
    """One product per token and expert, over both ranks: value and gradients."""
    weights, starts = {}, {}
    for e in range(EXPERTS):
        starts[e] = [random_tensor(e, 24, HIDDEN), random_tensor(100 + e, HIDDEN, 12)]
        weights[e] = [w.clone() for w in starts[e]]
    for e in TRAINED:
        weights[e] = [(w + _moved(e, n, w.shape)).requires_grad_() for n, w in enumerate(starts[e])]

    def put_out(pair, state):
        gate, up = (state @ pair[0].t()).chunk(2, dim=-1)
        return (torch.nn.functional.gelu(gate) * up) @ pair[1].t()

    total, count = torch.zeros(()), 0
    for rank, own in enumerate(labels):
        states = random_tensor(50 + rank, LENGTH, BATCH, HIDDEN)
        for sample, label in enumerate(own):
            if label != GENERAL:
                continue
            for state in states[:, sample]:
                count += 1
                top, ids = (state @ random_tensor(7, EXPERTS, HIDDEN).t()).topk(TOPK)
                for prob, e in zip(top.softmax(-1), ids.tolist(), strict=True):
                    if e in TRAINED:
                        before = put_out(starts[e], state)
                        change = put_out(weights[e], state) - before
                        total = total + prob * change.square().sum() / before.square().sum()
    value = total / max(count, 1)
    if value.requires_grad:
        (WEIGHT * value).backward()
    return value.detach(), {e: [w.grad for w in weights[e]] for e in TRAINED}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize(
    ("expert_parallel", "dispatcher", "recompute"),
    [
        (1, "alltoall", False),
        (2, "alltoall", False),
        (2, "alltoall", True),
        (2, "allgather", False),
    ],
)
def test_value_and_gradient_are_those_of_brute_force(
    processes, expert_parallel, dispatcher, recompute, labels
):
    results = processes.run(_held, expert_parallel, dispatcher, labels, recompute)
    value, expected = _brute_force(labels)
    assert bool(value > 0) == (labels is not LABELS["nobody"])
    for (total, count), _ in results:
        torch.testing.assert_close(total / count.clamp(min=1), value, rtol=1e-5, atol=1e-7)
    for expert in range(EXPERTS):
        ours = [gradients[expert] for _, gradients in results if expert in gradients]
        for n in range(2):
            if expert not in TRAINED:
                assert all(own[n] is None for own in ours)
                continue
            # Megatron's DDP divides the sum by the data-parallel ranks, experts' gradients too.
            found = sum(own[n] for own in ours) / 2
            wanted = expected[expert][n]
            wanted = torch.zeros_like(found) if wanted is None else wanted
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_untrained_experts_are_at_exactly_zero(processes):
    for (total, _), gradients in processes.run(
        _held, 2, "alltoall", LABELS["both ranks"], moved=False
    ):
        assert total == 0
        assert not any(g.any() for own in gradients.values() for g in own if g is not None)


def test_rows_of_padding_weigh_nothing(processes):
    """Experts padded to a capacity with room for all give what unpadded ones do."""
    arguments = (1, "alltoall", LABELS["both ranks"])
    for (total, count), _ in processes.run(_held, *arguments, capacity=2.0):
        torch.testing.assert_close(total / count, _brute_force(arguments[2])[0], rtol=1e-5, atol=0)


def _pulled():
    """Parameters whole on both ranks, split by tensor parallelism, of experts, and shared."""
    from megatron_moe_inject.retention.start import PullToStart

    rank = dist.get_rank()
    alone = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    both = SimpleNamespace(rank=lambda: rank, size=lambda: 2)
    groups = SimpleNamespace(tp=both, expt_tp=alone, dp_cp=alone, expt_dp=both)
    parameters = {
        "whole": {},
        "split": {"tensor_model_parallel": True},
        "expert": {"allreduce": False},
        "copy": {"shared": True, "tensor_model_parallel": True},
    }
    chunk = torch.nn.Module()
    chunk.config = SimpleNamespace(grad_scale_func=lambda x: x * 8)
    starts = {}
    for name, attributes in parameters.items():
        parameter = torch.nn.Parameter(torch.zeros(2, 3))
        vars(parameter).update(attributes, main_grad=torch.ones(2, 3))
        chunk.register_parameter(name, parameter)
        starts[parameter] = parameter.detach().clone()
        with torch.no_grad():
            parameter += 2 + (rank if name == "split" else 0)
    originals = SimpleNamespace(
        parameters=list(starts), of=lambda p, part: starts[p].view(-1)[part]
    )
    pull = PullToStart([chunk], groups, originals, None, lambda iteration: 0.5 * iteration)
    reports = [{}, {}]
    pull.end(3, reports)
    gradients = {name: p.main_grad for name, p in chunk.named_parameters()}
    (name,), (value,) = take_terms(reports)
    assert name == "l2 to start"
    return value, gradients


def test_each_parameter_is_counted_once_and_pulled_everywhere(processes):
    for rank, (value, gradients) in enumerate(processes.run(_pulled)):
        # Six values each: one whole 2, two parts that moved by 2 and 3, one expert's 2.
        assert value.tolist() == [0.5 * 6 * (4 + 4 + 9 + 4), 1]
        for name, gradient in gradients.items():
            moved = 2 + (rank if name == "split" else 0)
            assert torch.equal(gradient, torch.full((2, 3), 1 + 8 * 1.5 * moved)), name
