"""The two parts of a block, on a stand-in for Megatron's ``TransformerBlock``."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from megatron_moe_inject.experts.train import boundary as module
from megatron_moe_inject.experts.train.boundary import GradientBoundary
from megatron_moe_inject.host.errors import RecipeError


class Layer(torch.nn.Module):
    def __init__(self, index):
        super().__init__()
        self.layer_number = index + 1
        self.weight = torch.nn.Parameter(torch.tensor(float(index + 2)))
        self.seen = 0
        self.mlp = torch.nn.Identity()
        self.config = config()

    def forward(self, hidden):
        self.seen += 1
        return self.weight * hidden


class Block(torch.nn.Module):
    """Adds 1 after its layers, as its final norm; fails on an empty input."""

    def __init__(self, first, count, pre_process, final):
        super().__init__()
        self.config = config()
        self.layers = torch.nn.ModuleList(Layer(first + i) for i in range(count))
        self.num_layers_per_pipeline_rank = count
        self.pre_process = pre_process
        self.final_layernorm = torch.nn.Linear(1, 1) if final else None
        self.input_tensor = None
        self.recomputed = []

    def forward(self, hidden_states, attention_mask=None, extract_layer_indices=None):
        hidden = hidden_states if self.pre_process else self.input_tensor
        self.recomputed.append((self.config.recompute_granularity, len(self.layers)))
        for index in range(self.num_layers_per_pipeline_rank):
            hidden = self.layers[index](hidden)
        if hidden.numel() == 0:
            raise ValueError("empty")
        return hidden if self.final_layernorm is None else self.final_layernorm(hidden)


def config(**options):
    defaults = dict(recompute_granularity="full", fp8=None, fp8_recipe="delayed")
    return SimpleNamespace(**defaults | options)


def chunk(first=0, count=4, pre_process=True, final=False, **options):
    built = torch.nn.Module()
    built.decoder = Block(first, count, pre_process, final)
    built.config = built.decoder.config = config(**options)
    return built


def split(built, boundary):
    for layer in built.decoder.layers:
        layer.weight.requires_grad_(layer.layer_number > boundary)
    layers = built.decoder.layers
    first = layers[0].layer_number - 1 if layers else boundary
    GradientBoundary(built, boundary, cut=not built.decoder.pre_process and boundary >= first)
    return built.decoder


@pytest.mark.parametrize("keyword", [False, True])
def test_lower_layers_run_once_without_recompute_or_graph(keyword):
    block = split(chunk(), 2)
    hidden = torch.ones(3, 1, 1)
    output = block(hidden_states=hidden) if keyword else block(hidden)
    assert torch.equal(output, torch.full((3, 1, 1), 2.0 * 3 * 4 * 5))
    assert block.recomputed == [(None, 2), ("full", 2)]
    assert [layer.seen for layer in block.layers] == [1] * 4
    output.sum().backward()
    assert block.layers[1].weight.grad is None
    assert block.layers[2].weight.grad == 3 * 2 * 3 * 5


@pytest.mark.parametrize("boundary", [4, 6])
def test_a_later_stage_makes_no_gradient_of_what_it_received(boundary):
    received = torch.full((2, 1, 1), 2.0, requires_grad=True)
    block = split(chunk(first=4, pre_process=False), boundary)
    block.input_tensor = received
    output = block(None)
    assert torch.equal(output, torch.full((2, 1, 1), 2.0 * 6 * 7 * 8 * 9))
    output.sum().backward()
    assert received.grad is None
    assert block.layers[2].weight.grad is not None
    # Below the boundary nothing needs it any more.
    assert received.numel() == (2 if boundary == 4 else 1)


def test_a_later_stage_above_the_boundary_is_stock():
    received = torch.ones(2, 1, 1, requires_grad=True)
    block = split(chunk(first=4, pre_process=False), 3)
    block.input_tensor = received
    block(None).sum().backward()
    assert torch.equal(received.grad, torch.full((2, 1, 1), 6.0 * 7 * 8 * 9))


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("count", [0, 4])
def test_a_stage_wholly_below_keeps_its_final_norm_trainable(count, final):
    received = torch.ones(2, 1, 1, requires_grad=True)
    block = split(chunk(first=4, count=count, pre_process=False, final=final), 8)
    block.input_tensor = received
    output = block(None)
    if final:
        output.sum().backward()
        assert block.final_layernorm.weight.grad != 0
    elif count:
        assert not output.requires_grad
    assert received.grad is None


def test_a_first_stage_wholly_below_starts_no_graph():
    assert not split(chunk(), 7)(torch.ones(1, 1, 1)).requires_grad


def test_the_block_stays_as_it_was_also_after_an_error():
    block = split(chunk(), 2)
    before = {**vars(block), "_modules": dict(block._modules)}
    with pytest.raises(ValueError, match="empty"):
        block(torch.ones(0, 1, 1))
    assert {**vars(block), "_modules": dict(block._modules)} == before
    assert block.config.recompute_granularity == "full"
    with torch.no_grad():
        block(torch.ones(1, 1, 1))
    assert block.recomputed[-1] == ("full", 4)


def test_delayed_scaling_sees_one_region(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def region(config):
        entered.append(config)
        yield

    monkeypatch.setattr(module, "get_fp8_context", region)
    for options in ({}, {"fp8": "e4m3", "fp8_recipe": "blockwise"}):
        split(chunk(**options), 2)(torch.ones(1, 1, 1))
    assert entered == []
    split(chunk(fp8="hybrid"), 2)(torch.ones(1, 1, 1))
    assert len(entered) == 1


@pytest.mark.parametrize(
    ("options", "starts"),
    [
        ({}, True),
        ({"fp8": "e4m3", "fp8_recipe": "blockwise"}, True),
        ({"fp8": "hybrid"}, False),
        ({"recompute_granularity": "selective"}, False),
    ],
)
def test_the_graph_starts_at_experts_where_all_ranks_can(options, starts):
    """Under delayed scaling they must agree on the first FP8 module that has a graph."""
    layer = torch.nn.Module()
    layer.attention = torch.nn.Linear(2, 2).requires_grad_(False)
    layer.mlp = torch.nn.Module()
    layer.mlp.experts = torch.nn.Linear(2, 2)
    layer.config = config(recompute_modules=["moe"], **{"recompute_granularity": None} | options)
    assert module._starts_at_experts(layer) == starts
    layer.attention.requires_grad_(True)
    assert not module._starts_at_experts(layer)


class Manager(torch.nn.Module):
    """Like Megatron's ``CudaGraphManager``: in the place of a layer's forward or of a method."""

    def __init__(self, func=None):
        super().__init__()
        self.func = func


def test_layers_below_run_without_cuda_graphs_of_their_own():
    whole = chunk(cuda_graph_impl="local")
    layers = whole.decoder.layers
    for layer in layers:
        layer.cudagraph_manager = Manager()
        layer.cudagraph_manager_router = Manager(layer.half)
        layer.half = None  # the manager's
    split(whole, 2)
    for index, layer in enumerate(layers):
        assert hasattr(layer, "cudagraph_manager") == (index >= 2)
        assert hasattr(layer, "cudagraph_manager_router") == (index >= 2)
        assert (layer.half is not None) == (index < 2)
    assert layers[0].half.__func__ is torch.nn.Module.half


@pytest.mark.parametrize(
    ("option", "flag"),
    [
        ("cpu_offloading", "--cpu-offloading-num-layers"),
        ("fine_grained_activation_offloading", "--fine-grained-activation-offloading"),
    ],
)
def test_offloading_of_activations_is_refused_where_layers_have_no_backward(option, flag):
    GradientBoundary(chunk(**{option: True}), 0)
    with pytest.raises(RecipeError, match=f"{flag}: offloads .* the 2 layers below"):
        GradientBoundary(chunk(**{option: True}), 2)
