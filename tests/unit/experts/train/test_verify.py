"""Fingerprints notice every kind of change, at the scale of one bit."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding
from megatron.core.transformer.moe import router

from megatron_moe_inject.experts.train.freeze import FreezePolicy
from megatron_moe_inject.experts.train.verify import (
    MAY_CHANGE,
    FrozenCheck,
    fingerprint,
    frozen_tensors,
)
from megatron_moe_inject.routing.rows import TrainedRows
from tests.harness.module_tree import student
from tests.harness.routers import Chunk


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Routers ask for the current device for their buffers."""
    monkeypatch.setattr("torch.cuda.current_device", lambda: torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_equal_bits_equal_fingerprint(dtype):
    values = torch.arange(37).to(dtype)
    assert torch.equal(fingerprint(values), fingerprint(values.clone()))


@settings(max_examples=50)
@given(st.integers(0, 99), st.integers(0, 30))
def test_one_flipped_bit_changes_it(index, bit):
    values = torch.randn(10, 10)
    changed = values.clone()
    changed.view(torch.int32).view(-1)[index] ^= 1 << bit
    assert not torch.equal(fingerprint(values), fingerprint(changed))


def test_order_and_sign_of_zero_count():
    values = torch.tensor([1.0, 2.0, 0.0])
    assert not torch.equal(fingerprint(values), fingerprint(values[[1, 0, 2]]))
    assert not torch.equal(fingerprint(values), fingerprint(torch.tensor([1.0, 2.0, -0.0])))


def test_large_tensors_are_hashed_across_blocks(monkeypatch):
    monkeypatch.setattr("megatron_moe_inject.experts.train.verify._BLOCK", 8)
    values = torch.randn(33)
    whole = fingerprint(values)
    for index in (0, 9, 32):
        changed = values.clone()
        changed[index] += 1
        assert not torch.equal(whole, fingerprint(changed)), index
    swapped = torch.cat([values[8:16], values[:8], values[16:]])
    assert not torch.equal(whole, fingerprint(swapped))


def everything_frozen():
    return FreezePolicy({}, frozenset())


def test_check_names_what_changed_and_ignores_what_trains():
    """Whatever the flags on parameters and modules say."""
    chunk = student(layers=1)
    policy = FreezePolicy({4: frozenset({6})}, frozenset({"norms"}))
    policy.apply([chunk])
    check = FrozenCheck([chunk], policy)
    layer = chunk.decoder.layers.get_submodule("0")
    for trained in ("input_layernorm.weight", "mlp.experts.local_experts.0.linear_fc1.weight"):
        layer.get_parameter(trained).data += 1
    assert check.changed() == []
    chunk.requires_grad_(True)
    layer.mlp.experts.local_experts.get_submodule("1").linear_fc2.weight.data[1] += 1e-6
    layer.mlp.router.weight.data[0] = 1
    assert check.changed() == [
        "chunk0.decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight",
        "chunk0.decoder.layers.0.mlp.router.weight",
    ]


def test_a_tensor_that_appears_or_goes_is_a_change():
    chunk = student(layers=1)
    check = FrozenCheck([chunk], everything_frozen())
    chunk.decoder.register_buffer("new", torch.zeros(1))
    del chunk.output_layer
    assert check.changed() == ["chunk0.decoder.new", "chunk0.output_layer.weight"]


def test_every_buffer_of_a_frozen_router_counts_but_its_statistics():
    """Also where no module says that its bias is frozen, as in Megatron-Core 0.18."""
    chunk = Chunk(moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid")
    policy = FreezePolicy({}, frozenset(), frozenset({1}))  # the second layer trains whole
    check = FrozenCheck([chunk], policy)
    for own in chunk.routers:
        del own.frozen_expert_bias
        own.local_tokens_per_expert += 1
        own.expert_bias[3] += 1e-3
    assert check.changed() == ["chunk0.decoder.layers.0.mlp.router.expert_bias"]


def test_what_may_change_is_what_megatron_keeps_beside_parameters():
    """Each name is one that Megatron registers; all others that a GPT model has are verified."""
    source = "".join(
        Path(inspect.getfile(module)).read_text() for module in (router, yarn_rotary_pos_embedding)
    )
    registered = set(re.findall(r"register_buffer\(\s*['\"](\w+)['\"]", source))
    assert registered - set(MAY_CHANGE) == {"expert_bias", "qb_beta"}
    assert set(MAY_CHANGE) < registered


def test_of_a_router_with_rows_that_train_the_others_and_the_bias_count():
    chunk = Chunk(moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid")
    policy, rows = everything_frozen(), {1: [2, 4]}
    policy.apply([chunk])
    TrainedRows(chunk.routers[1], 1, rows[1], stored=False)
    check = FrozenCheck([chunk], policy, rows)
    first, second = chunk.routers
    second.weight.data[[2, 4]] += 1
    second.inject_rows.data += 1
    assert check.changed() == []
    second.weight.data[3, 0] += 1
    second.expert_bias[0] += 1
    first.weight.data[2, 0] += 1
    assert check.changed() == [
        "chunk0.decoder.layers.0.mlp.router.weight",
        "chunk0.decoder.layers.1.mlp.router.expert_bias",
        "chunk0.decoder.layers.1.mlp.router.weight",
    ]


def test_projections_train():
    chunk = student(layers=1)
    chunk.add_module("inject_projections", torch.nn.Linear(2, 2))
    names = [name for name, _ in frozen_tensors([chunk], everything_frozen())]
    assert len(names) == len(list(chunk.parameters())) - 2
