"""What is added to schedule plans: the loss, the count of micro-batches, where a graph begins."""

from types import SimpleNamespace

import pytest
import torch

from megatron_moe_inject.experts.train.planned import PlannedBoundary
from megatron_moe_inject.host.clock import ChunkClock, Passages
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.loss_seam import LossSeam
from megatron_moe_inject.host.schedule_plan import runs_by_plan


class Node:
    """As Megatron's: detaches what it gets, keeps it, and runs a backward of its own."""

    def __init__(self, submodule):
        self.submodule = submodule
        self.backward_func = lambda outputs, gradients: outputs[0].backward(gradients[0])

    def forward(self, hidden):
        self.inputs = [hidden.detach().requires_grad_(hidden.requires_grad)]
        self.output = self.submodule(self, *self.inputs)
        return self.output

    def backward(self, gradient):
        self.backward_func((self.output,), (gradient,))
        gradient = self.inputs[0].grad
        self.inputs = self.output = None
        return gradient


class Plan:
    def __init__(self, chunk, labels, output_processor):
        self.labels, self.output_processor = labels, output_processor
        embedded = torch.ones(2)
        self.pre_process = Node(lambda node, hidden: embedded)
        self._layers = [self._layer(chunk, i) for i in range(len(chunk.decoder.layers))]

    def _layer(self, chunk, i):
        def attention(node, hidden):
            chunk.seen.append((i, *chunk.passing()))
            return hidden * chunk.decoder.layers[i].weight.sum()

        parts = [Node(attention), Node(lambda node, hidden: hidden * 2)]
        return SimpleNamespace(
            pre_dispatch_computation=parts[0], mlp=parts[1], moe_combine=object()
        )

    def num_layers(self):
        return len(self._layers)

    def get_layer(self, i):
        return self._layers[i]

    def nodes(self):
        for layer in self._layers:
            yield from (layer.pre_dispatch_computation, layer.mlp)

    def run_forward(self):
        hidden = self.pre_process.forward(torch.ones(2))
        for node in self.nodes():
            hidden = node.forward(hidden)
        return hidden

    def run_backward(self, gradient):
        for node in reversed(list(self.nodes())):
            gradient = node.backward(gradient)
        self.pre_process.backward(gradient)
        return gradient


class Chunk(torch.nn.Module):
    pre_process = post_process = True

    def __init__(self, layers=3, overlaps=True):
        super().__init__()
        self.config = SimpleNamespace(overlap_moe_expert_parallel_comm=overlaps)
        self.decoder = torch.nn.Module()
        self.decoder.final_layernorm = torch.nn.Identity()
        self.decoder.layers = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(layers))
        for i, layer in enumerate(self.decoder.layers):
            layer.layer_number = i + 1
            torch.nn.init.constant_(layer.weight, 1.5)
        self.requires_grad_(False)
        self.seen = []
        self.passing = lambda: ()

    def forward(self, output_processor=None):
        """As GPTModel's."""

    def build_schedule_plan(self, tokens, labels=None, output_processor=None):
        return Plan(self, labels, output_processor)


def train(chunk, layer):
    chunk.decoder.layers[layer].weight.requires_grad_(True)


def test_only_where_the_flag_is():
    assert runs_by_plan(Chunk())
    assert not runs_by_plan(Chunk(overlaps=False))
    plain = Chunk(overlaps=False)
    LossSeam(plain)
    ChunkClock(plain)
    assert "build_schedule_plan" not in vars(plain)


def test_a_plan_gets_the_loss_in_force():
    chunk = Chunk()
    seam = LossSeam(chunk)
    assert chunk.build_schedule_plan("t", labels="l").output_processor is None
    with seam.using(len):
        assert chunk.build_schedule_plan("t", labels="l").output_processor is len
        assert chunk.build_schedule_plan("t").output_processor is None


def test_nodes_know_their_micro_batch_in_whatever_order_plans_run():
    chunk = Chunk(layers=2)
    clock = ChunkClock(chunk)
    chunk.passing = Passages(clock).passing
    first, second = chunk.build_schedule_plan("t"), chunk.build_schedule_plan("t")
    hidden = [first.pre_process.forward(torch.ones(2)) for _ in range(2)]
    pairs = zip(first.nodes(), second.nodes(), strict=True)
    for one, other in pairs:  # layer by layer, one micro-batch beside another
        hidden[0], hidden[1] = one.forward(hidden[0]), other.forward(hidden[1])
        assert not clock.inside
    assert chunk.seen == [(0, 0, True), (0, 1, True), (1, 0, True), (1, 1, True)]
    clock.reset()
    chunk.seen.clear()
    chunk.build_schedule_plan("t").run_forward()
    assert chunk.seen == [(0, 0, True), (1, 0, True)]


@pytest.mark.parametrize("boundary", [0, 1, 2])
def test_backward_ends_at_the_boundary(boundary):
    chunk = Chunk()
    train(chunk, boundary)
    train(chunk, 2)
    PlannedBoundary(chunk, boundary)
    plan = chunk.build_schedule_plan("t")
    result = plan.run_forward()
    nodes = list(plan.nodes())
    assert [node.output.requires_grad for node in nodes] == [i >= 2 * boundary for i in range(6)]
    plan.run_backward(torch.ones(2))
    # d(result)/d(weight) of a chain of factors 2 w, over both elements.
    expected = 2 * float(result[0].detach()) / 1.5
    for i, layer in enumerate(chunk.decoder.layers):
        gradient = layer.weight.grad
        assert (None if gradient is None else float(gradient)) == (
            pytest.approx(expected) if layer.weight.requires_grad else None
        ), i
    assert all(node.output is None for node in (*nodes, plan.pre_process))


def test_the_last_layer_runs_backward_for_the_norm_behind_it():
    chunk = Chunk()
    PlannedBoundary(chunk, 3)
    plan = chunk.build_schedule_plan("t")
    plan.run_forward()
    assert [node.output.requires_grad for node in plan.nodes()] == 4 * [False] + 2 * [True]


def stage(first, layers=2, last=False):
    """A chunk of a later stage, which begins with that layer."""
    chunk = Chunk(layers)
    chunk.pre_process = False
    chunk.decoder.final_layernorm = torch.nn.Identity() if last else None
    for layer in chunk.decoder.layers:
        layer.layer_number += first
    return chunk


@pytest.mark.parametrize(
    ("boundary", "graph"), [(2, "yes yes"), (3, "no yes"), (4, "no no"), (9, "no no")]
)
def test_a_later_stage_sends_a_gradient_of_what_it_received(boundary, graph):
    """Zeros, where it has layers below the boundary; they build no graph."""
    chunk = stage(2)
    PlannedBoundary(chunk, boundary)
    plan = chunk.build_schedule_plan("t")
    received = torch.ones(2, requires_grad=True)
    plan.pre_process.submodule = lambda node, hidden: received
    plan.run_forward()
    made = [node.output.requires_grad for node in plan.nodes()]
    assert made == [word == "yes" for word in graph.split() for _ in range(2)]
    sent = plan.run_backward(torch.ones(2))
    assert sent is not None, "Megatron sends what the first layer gives"
    assert received.grad.tolist() == ([0, 0] if "no" in graph else [9, 9])


def test_the_last_stage_keeps_the_layer_before_the_final_norm():
    chunk = stage(2, last=True)
    PlannedBoundary(chunk, 4)
    plan = chunk.build_schedule_plan("t")
    plan.run_forward()
    assert [node.output.requires_grad for node in plan.nodes()] == 2 * [False] + 2 * [True]


@pytest.mark.parametrize(("first", "boundary"), [(0, -1), (2, 2), (2, 0)])
def test_a_stage_with_nothing_below_is_as_it_was(first, boundary):
    chunk = stage(first)
    chunk.pre_process = first == 0
    PlannedBoundary(chunk, boundary)
    assert "build_schedule_plan" not in vars(chunk)


def test_offloaded_activations_count_on_every_backward():
    chunk = Chunk()
    chunk.config.fine_grained_activation_offloading = True
    with pytest.raises(RecipeError, match="--fine-grained-activation-offloading"):
        PlannedBoundary(chunk, 2)
    PlannedBoundary(chunk, 0)
