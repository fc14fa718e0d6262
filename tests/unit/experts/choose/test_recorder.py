"""What the recorder counts, against a loop over tokens."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.moe_utils import (
    apply_router_token_dropping,
    topk_routing_with_score_function,
)

from megatron_moe_inject.experts.choose.recorder import RoutingRecorder
from tests.harness.routers import GROUPS
from tests.harness.steps import step_of

LENGTH, EXPERTS, TOPK = 5, 4, 2
LABELS = torch.tensor([[-1, 1], [0, -1], [1, 1]])


class Router(torch.nn.Module):
    """Megatron's routing functions behind the interface of its router."""

    topk, expert_bias = TOPK, None

    def __init__(self, config, seed):
        super().__init__()
        self.config, self.score_function = config, config.moe_router_score_function
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(EXPERTS, 6, generator=generator))

    def routing(self, logits, padding_mask=None):
        logits = logits.view(-1, EXPERTS)
        gates, chosen = topk_routing_with_score_function(
            logits, TOPK, score_function=self.score_function
        )
        if self.config.moe_expert_capacity_factor is not None:
            gates, chosen = apply_router_token_dropping(
                gates, chosen, TOPK, self.config.moe_expert_capacity_factor
            )
        return gates, chosen

    def forward(self, hidden, padding_mask=None):
        logits = hidden @ self.weight.t()
        return self.routing(logits, padding_mask=padding_mask)


class Layer(torch.nn.Module):
    def __init__(self, number, router):
        super().__init__()
        self.layer_number = number
        self.mlp = torch.nn.Module()
        if router is not None:
            self.mlp.router = router

    def forward(self, hidden, padding_mask):
        if hasattr(self.mlp, "router"):
            self.mlp.router(hidden, padding_mask)
        return torch.tanh(hidden)


class Chunk(torch.nn.Module):
    """A dense layer between two with routers; recomputed in the backward pass."""

    def __init__(self, score_function, capacity):
        super().__init__()
        self.config = SimpleNamespace(
            sequence_parallel=False,
            num_moe_experts=EXPERTS,
            moe_router_topk=TOPK,
            moe_router_score_function=score_function,
            moe_router_pre_softmax=False,
            moe_router_num_groups=None,
            moe_router_group_topk=None,
            moe_router_topk_scaling_factor=None,
            moe_router_fusion=False,
            moe_expert_capacity_factor=capacity,
        )
        routers = [Router(self.config, 1), None, Router(self.config, 3)]
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList(
            Layer(i + 1, router) for i, router in enumerate(routers)
        )

    def run(self, hidden, padding_mask=None):
        for layer in self.decoder.layers:
            hidden = layer(hidden, padding_mask)
        return hidden

    def forward(self, hidden, padding_mask=None):
        return torch.utils.checkpoint.checkpoint(self.run, hidden, padding_mask, use_reentrant=True)


def recorded(chunk, padding=None):
    """Statistics of three micro-batches, run in 1F1B order; and their inputs."""
    recorder = RoutingRecorder([chunk], 3, GROUPS, coselections=True)
    generator = torch.Generator().manual_seed(9)
    inputs = [torch.randn(LENGTH, 2, 6, generator=generator).requires_grad_() for _ in LABELS]
    chunk(inputs[0])  # outside a step nothing counts
    step = step_of(labels=LABELS)
    recorder.begin(step)
    outputs = [chunk(hidden, padding) for hidden in inputs]
    for output in outputs:
        output.sum().backward()
    recorder.end(step, [])
    chunk(inputs[0])
    return recorder, inputs


def all_gather_alone(stages, own, group):
    stages[0] = own


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("capacity", [None, 0.5])
@pytest.mark.parametrize("padded", [False, True])
def test_every_sum_is_that_of_a_loop_over_tokens(monkeypatch, score_function, capacity, padded):
    monkeypatch.setattr("torch.distributed.all_gather_object", all_gather_alone)
    chunk = Chunk(score_function, capacity)
    padding = torch.zeros(LENGTH, 2, dtype=torch.bool)
    padding[3:, 1] = padded
    recorder, inputs = recorded(chunk, padding if padded else None)
    statistics = recorder.statistics([("a",), ("b",), ("c",)])
    assert recorder.watch.layers == [0, 2]

    for row, layer in enumerate((0, 2)):
        router = chunk.decoder.layers[layer].mlp.router
        for index, label in enumerate((-1, 0, 1)):
            expected = {name: np.zeros(EXPERTS) for name in ("chosen", "gates", "probs", "dropped")}
            pairs, tokens, shares = np.zeros((EXPERTS, EXPERTS)), 0, []
            for hidden, labels in zip(inputs, LABELS.tolist(), strict=True):
                states = hidden.detach() if layer == 0 else torch.tanh(torch.tanh(hidden.detach()))
                logits = states @ router.weight.detach().t()
                gates, kept = Router.routing(router, logits)
                gates, kept = gates.view(LENGTH, 2, -1), kept.view(LENGTH, 2, -1)
                for sample in range(2):
                    if labels[sample] != label:
                        continue
                    of_sequence = np.zeros(EXPERTS)
                    for position in range(LENGTH):
                        if padded and padding[position, sample]:
                            continue
                        token = logits[position, sample]
                        scores = token.softmax(-1)
                        if score_function == "sigmoid":
                            scores = token.sigmoid() / token.sigmoid().sum()
                        best = token.topk(TOPK).indices.tolist()
                        tokens += 1
                        expected["probs"] += scores.numpy()
                        for expert in best:
                            of_sequence[expert] += 1
                            expected["gates"][expert] += float(gates[position, sample, expert])
                            expected["dropped"][expert] += not kept[position, sample, expert]
                        pairs[best[0], best[1]] += 1
                        pairs[best[1], best[0]] += 1
                    expected["chosen"] += of_sequence
                    shares.append(of_sequence / of_sequence.sum())
            found = statistics[index]
            assert found.tokens[row] == tokens
            assert found.spread.sequences == len(shares)
            np.testing.assert_array_equal(found.selections[row], expected["chosen"])
            np.testing.assert_array_equal(found.coselections[row], pairs)
            np.testing.assert_allclose(found.gate_sums[row], expected["gates"], rtol=1e-5)
            np.testing.assert_allclose(found.prob_sums[row], expected["probs"], rtol=1e-5)
            if capacity is None:
                assert found.dropped is None
            else:
                np.testing.assert_array_equal(found.dropped[row], expected["dropped"])
            np.testing.assert_allclose(found.spread.share_sums[row], np.sum(shares, axis=0))
            np.testing.assert_allclose(
                found.spread.share_squares[row], np.square(shares).sum(axis=0)
            )


def test_a_class_without_a_sequence_is_left_out(monkeypatch):
    monkeypatch.setattr("torch.distributed.all_gather_object", all_gather_alone)
    recorder, _ = recorded(Chunk("softmax", None))
    recorder._sequences[1] = 0
    assert recorder.statistics([(), (), ()])[1] is None
