"""What was not finite in a step, in the order in which it was computed."""

import torch

from megatron_moe_inject.host.finite import FiniteWatch
from tests.harness.steps import step_of


def test_nothing_to_say():
    watch = FiniteWatch()
    watch.begin(step_of(iteration=4))
    watch.see("states", torch.full((3, 4), 3e38, dtype=torch.float32)[:1])
    watch.see("no samples", torch.empty(0, 4))
    assert watch.found() is None
    watch.begin(step_of(iteration=5))
    assert watch.found() is None


def test_first_things_first(capsys):
    watch = FiniteWatch()
    watch.begin(step_of(iteration=7))
    states = torch.ones(2, requires_grad=True)
    for factor in (1.0, float("inf")):
        watch.see("states", states)
        watch.see_gradient("gradient of the states", states * 1)
        scaled = states * factor
        watch.see_gradient("gradient of the states", scaled)
        watch.see("loss", scaled.bfloat16())
        (scaled * factor).sum().backward()
    found = watch.found()
    assert found.startswith("megatron_moe_inject: not finite in step 8 on this rank")
    assert "first things first: loss (micro-batch 1 of 2); gradient of the states" in found
    assert found.endswith("Looked at: states, loss, gradient of the states")
    watch.say()
    watch.say()
    assert capsys.readouterr().err.count("not finite in step 8") == 1
    watch.begin(step_of(iteration=8))
    assert watch.found() is None


def test_layers_are_seen_by_their_global_number():
    layer = torch.nn.Linear(2, 2)
    layer.layer_number = 6
    chunk = torch.nn.Module()
    chunk.decoder = torch.nn.Module()
    chunk.decoder.layers = torch.nn.ModuleList([layer])
    watch = FiniteWatch()
    watch.see_layers([chunk])
    watch.begin(step_of(iteration=0))
    layer(torch.full((1, 2), float("nan")))
    assert "output of decoder layer 5 (micro-batch 0 of 1)" in watch.found()
