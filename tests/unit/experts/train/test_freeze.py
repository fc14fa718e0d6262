"""The freezing policy on the parameter names of Megatron's GPT model."""

import pytest
import torch

from megatron_moe_inject.experts.train.freeze import FreezePolicy, first_trainable_layer
from megatron_moe_inject.host.model_parts import (
    COMPONENTS,
    places,
)
from tests.harness.module_tree import LAYER, OUTSIDE, student
from tests.harness.routers import Chunk, inputs


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Routers ask for the current device for their buffers."""
    monkeypatch.setattr("torch.cuda.current_device", lambda: torch.device("cpu"))


def test_every_parameter_has_its_component_layer_and_global_expert():
    found = {place.name: place for place, _ in places(student())}
    for name, component in OUTSIDE.items():
        assert (found[name].component, found[name].layer) == (component, None)
    for index in (0, 1):
        for name, component in LAYER.items():
            place = found[f"decoder.layers.{index}.{name}"]
            assert (place.component, place.layer) == (component, 4 + index)
    expert = found["decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight"]
    assert expert.expert == 7
    assert {place.component for place in found.values()} <= set(COMPONENTS)


def trained(chunk):
    return {name for name, p in chunk.named_parameters() if p.requires_grad}


def test_only_the_chosen_experts_train():
    chunk = student()
    FreezePolicy({5: frozenset({7, 0})}, frozenset()).apply([chunk])
    assert trained(chunk) == {"decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight"}


def test_all_experts_and_named_components():
    chunk = student()
    FreezePolicy(None, frozenset({"router", "norms"})).apply([chunk])
    wanted = {n for n, c in LAYER.items() if c in ("experts", "router", "norms")}
    names = {f"decoder.layers.{i}.{n}" for i in (0, 1) for n in wanted}
    assert trained(chunk) == names | {"decoder.final_layernorm.weight"}


def test_frozen_router_keeps_its_bias_and_a_trained_one_does_not():
    for components, frozen in ((frozenset(), True), (frozenset({"router"}), False)):
        chunk = student()
        router = chunk.decoder.layers.get_submodule("0").mlp.router
        router.frozen_expert_bias = False
        FreezePolicy({4: frozenset({6})}, components).apply([chunk])
        assert router.frozen_expert_bias is frozen


def test_a_frozen_routers_bias_is_held_where_megatron_cannot():
    """0.18 updates every bias, by counts that a frozen router then does not make."""
    for components, counted in ((frozenset(), 0), (frozenset({"router"}), 10 * 2)):
        chunk = Chunk(moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid")
        for router in chunk.routers:
            del router.frozen_expert_bias
        FreezePolicy({}, components).apply([chunk])
        chunk(inputs(1)[0])
        for router in chunk.routers:
            assert router.local_tokens_per_expert.sum() == counted
            assert getattr(router, "frozen_expert_bias", False) is (counted == 0)
    plain = Chunk()
    del plain.routers[0].frozen_expert_bias
    FreezePolicy({}, frozenset()).apply([plain])
    assert not hasattr(plain.routers[0], "frozen_expert_bias")


def test_grouped_experts_have_a_parameter_each():
    """Of experts 6 and 7, which this rank holds."""
    names = ("mlp.experts.linear_fc1.weight0", "mlp.experts.linear_fc2.weight1")
    grouped = student(extra=names)
    FreezePolicy({4: frozenset({7})}, frozenset()).apply([grouped])
    found = [name for name in trained(grouped) if "linear_fc" in name and "local" not in name]
    assert [name.split(".mlp.")[1] for name in found] == ["experts.linear_fc2.weight1"]


def test_experts_in_one_parameter_may_train_or_rest_whole():
    grouped = student(extra=("mlp.experts.weight1",))
    with pytest.raises(NotImplementedError, match="all its experts in one parameter"):
        FreezePolicy({4: frozenset({6})}, frozenset()).apply([grouped])
    FreezePolicy(None, frozenset()).apply([grouped])
    assert any("experts.weight1" in name for name in trained(grouped))
    FreezePolicy({}, frozenset({"router"})).apply([grouped])
    assert not any("experts.weight1" in name for name in trained(grouped))


def test_lowest_trainable_position():
    chunk = student()
    for policy, lowest in (
        (FreezePolicy({5: frozenset({6})}, frozenset()), 5),
        (FreezePolicy({4: frozenset({6}), 5: frozenset({7})}, frozenset()), 4),
        (FreezePolicy({}, frozenset({"output_layer"})), 12),
        (FreezePolicy({}, frozenset({"embedding"})), -1),
        (FreezePolicy({4: frozenset({99})}, frozenset()), 12),
    ):
        policy.apply([chunk])
        assert first_trainable_layer([chunk], num_layers=12) == lowest


def test_layers_and_patterns_name_parameters_by_their_global_numbers():
    """Layers 4 and 5, experts 6 and 7 are here; grouped experts have names like single ones."""
    grouped = ("mlp.experts.linear_fc1.weight0", "mlp.experts.linear_fc2.weight1")
    chunk = student(extra=grouped)
    names = {at.global_name for at, _ in places(chunk)}
    assert "decoder.layers.4.mlp.experts.6.linear_fc1.weight" in names
    assert "decoder.layers.4.mlp.experts.7.linear_fc2.weight" in names
    patterns = ("decoder.layers.4.mlp.experts.7.*",)
    policy = FreezePolicy({}, frozenset(), frozenset({5}), patterns)
    policy.apply([chunk])
    for at, parameter in places(chunk):
        assert parameter.requires_grad == (at.layer == 5 or at.expert == 7), at
    assert policy.described()["layers"] == [5]
    assert "layers" not in FreezePolicy({}, frozenset()).described()


def test_a_router_that_trains_by_pattern_keeps_its_bias_updates():
    chunk = student()
    for pattern, frozen in (("*.router.*", False), ("*.norm.*", True)):
        router = chunk.decoder.layers.get_submodule("0").mlp.router
        router.frozen_expert_bias = False
        FreezePolicy({}, frozenset(), patterns=(pattern,)).apply([chunk])
        assert router.frozen_expert_bias is frozen
