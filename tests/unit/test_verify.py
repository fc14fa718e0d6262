"""Fingerprints notice every kind of change, at the scale of one bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_inject.experts.verify import FrozenCheck, fingerprint, frozen_tensors


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
    monkeypatch.setattr("megatron_moe_inject.experts.verify._BLOCK", 8)
    values = torch.randn(33)
    whole = fingerprint(values)
    values[32] += 1
    assert not torch.equal(whole, fingerprint(values))


def test_check_names_what_changed_and_ignores_what_trains():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[0].requires_grad_(False)
    check = FrozenCheck([model])
    model[1].weight.data += 1
    assert check.changed() == []
    model[0].bias.data[1] += 1e-6
    assert check.changed() == ["chunk0.0.bias"]


def test_thawing_a_parameter_is_a_change():
    model = torch.nn.Linear(2, 2).requires_grad_(False)
    check = FrozenCheck([model])
    model.bias.requires_grad_(True)
    assert check.changed() == ["chunk0.bias"]


def test_bias_of_a_frozen_router_counts():
    class Router(torch.nn.Module):
        def __init__(self, frozen):
            super().__init__()
            self.frozen_expert_bias = frozen
            self.register_buffer("expert_bias", torch.zeros(4))

    names = [
        name for name, _ in frozen_tensors([torch.nn.ModuleList([Router(True), Router(False)])])
    ]
    assert names == ["chunk0.0.expert_bias"]
