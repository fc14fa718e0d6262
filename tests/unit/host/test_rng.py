"""What draws random numbers beside the student must not change the student's."""

import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_moe_inject.host.rng import untouched_rng

CPU = torch.device("cpu")


class Tracker:
    """Megatron's RNG tracker, as far as it is used: states by name, replaced on ``fork``."""

    def __init__(self):
        self.states = {"plain": torch.get_rng_state(), "graph-safe": torch.Generator()}

    def get_states(self):
        return dict(self.states)

    def set_states(self, states):
        self.states = states


@pytest.fixture
def tracker(monkeypatch):
    tracker = Tracker()
    module = SimpleNamespace(
        _CUDA_RNG_STATE_TRACKER_INITIALIZED=True, get_cuda_rng_tracker=lambda: tracker
    )
    monkeypatch.setitem(sys.modules, "megatron.core.tensor_parallel.random", module)
    return tracker


def test_the_cpu_generator_is_put_back():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with untouched_rng(CPU):
        torch.rand(7)
    assert torch.equal(torch.rand(4), expected)


def test_it_is_put_back_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), untouched_rng(CPU):
        torch.rand(7).view(2, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_tracker_is_put_back(tracker):
    generator = tracker.states["graph-safe"]
    states = tracker.states["plain"].clone(), generator.get_state()
    with untouched_rng(CPU):
        torch.rand(1, generator=generator)
        tracker.states["plain"] = torch.Generator().manual_seed(9).get_state()
    assert torch.equal(tracker.states["plain"], states[0])
    assert tracker.states["graph-safe"] is generator
    assert torch.equal(generator.get_state(), states[1])


def test_a_tracker_that_nobody_seeded_is_not_made(tracker, monkeypatch):
    def make():
        raise AssertionError("made a tracker")

    module = sys.modules["megatron.core.tensor_parallel.random"]
    monkeypatch.setattr(module, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", False)
    monkeypatch.setattr(module, "get_cuda_rng_tracker", make)
    with untouched_rng(CPU):
        pass


def test_biases_that_forced_routers_draw_once_are_drawn_again(monkeypatch):
    known = {3: torch.ones(2)}
    shared = SimpleNamespace(RandomSTEShared=SimpleNamespace(_cache=dict(known)))
    monkeypatch.setitem(sys.modules, "megatron.core.transformer.moe.moe_utils", shared)
    with untouched_rng(CPU):
        shared.RandomSTEShared._cache[4] = torch.zeros(2)
    assert shared.RandomSTEShared._cache == known
