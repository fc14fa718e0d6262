"""``--delay-wgrad-compute`` around layers with the rules of Transformer Engine's."""

import queue
from types import SimpleNamespace

import pytest
import torch

from megatron_moe_inject.experts.train.delayed import ask_no_frozen_layer


class Delayed(torch.nn.Module):
    """A linear layer with a norm in it, as TE's: its backward leaves the weight's gradient to
    ``backward_dw``, which takes an empty queue for an error."""

    def __init__(self):
        super().__init__()
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(4))
        self.weight = torch.nn.Parameter(torch.ones(3, 4))
        self.wgrad_store = queue.Queue()

    def forward(self, rows):
        normed = rows * self.layer_norm_weight
        result = torch.nn.functional.linear(normed, self.weight.detach())
        if self.weight.requires_grad:
            kept = normed.detach()
            result.register_hook(lambda gradient: self.wgrad_store.put((gradient, kept)))
        return result

    def backward_dw(self):
        if self.wgrad_store.empty():
            raise RuntimeError("Pop empty queue.")
        gradient, rows = self.wgrad_store.get()
        self.weight.grad = gradient.t() @ rows


def chunk_of(*trained, delay=True):
    chunk = torch.nn.Sequential(Delayed(), Delayed())
    chunk.config = SimpleNamespace(delay_wgrad_compute=delay)
    chunk.requires_grad_(False)
    for index, name in trained:
        getattr(chunk[index], name).requires_grad_(True)
    ask_no_frozen_layer([chunk])
    return chunk


@pytest.mark.parametrize("name", ["weight", "layer_norm_weight"])
def test_frozen_layers_are_not_asked_and_trained_ones_are(name):
    chunk = chunk_of((0, name))
    chunk[0](torch.ones(2, 4, requires_grad=True)).sum().backward()
    for layer in chunk:
        layer.backward_dw()
    assert (chunk[0].weight.grad is not None) == (name == "weight")
    assert chunk[1].weight.grad is None


def test_a_trained_layer_still_finds_its_own_errors():
    chunk = chunk_of((0, "weight"))
    with pytest.raises(RuntimeError, match="empty queue"):
        chunk[0].backward_dw()


def test_without_the_flag_nothing_is_wrapped():
    chunk = chunk_of(delay=False)
    assert "backward_dw" not in vars(chunk[1])
