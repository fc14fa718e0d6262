"""A grouped linear layer that is led to make weight gradients though its first weight is frozen."""

from types import SimpleNamespace

import pytest
import torch

from megatron_moe_inject.experts.grouped_whole import keeps_histories, train_whole


class Linear(torch.nn.Module):
    """Two experts ``[n, n]``; like TE's, asks its first weight, and may fail inside."""

    def __init__(self, first_trains):
        super().__init__()
        self.num_gemms, self.fuse_wgrad_accumulation, self.asked = 2, True, []
        for i, trains in enumerate((first_trains, True)):
            self.register_parameter(f"weight{i}", torch.nn.Parameter(torch.eye(3), trains))

    def forward(self, rows, fail=False):
        self.asked.append(self.weight0.requires_grad)
        if fail:
            raise ZeroDivisionError
        return rows @ self.weight0 + rows @ self.weight1


def experts(first_trains):
    layers = {name: Linear(first_trains) for name in ("linear_fc1", "linear_fc2")}
    whole = torch.nn.ModuleDict(layers)
    for name, layer in layers.items():
        setattr(whole, name, layer)
    train_whole(whole)
    return layers


@pytest.mark.parametrize("first_trains", [False, True])
def test_the_first_weight_wants_a_gradient_inside_alone(first_trains):
    for layer in experts(first_trains).values():
        stock = dict(layer.named_parameters())
        rows = torch.ones(2, 3)
        layer(rows).sum().backward()
        with torch.no_grad():
            layer(rows)
        with pytest.raises(ZeroDivisionError):
            layer(rows, fail=True)
        assert layer.asked == [True, first_trains, True]
        assert "weight0" not in vars(layer)
        assert layer.weight0 is stock["weight0"]
        assert layer.weight0.requires_grad == first_trains
        assert (layer.weight0.grad is None) == (not first_trains)
        assert layer.weight1.grad is not None
        assert not layer.fuse_wgrad_accumulation, "frozen weights have no main_grad to add to"
        assert list(layer.state_dict()) == ["weight0", "weight1"]


@pytest.mark.parametrize(
    ("fp8", "recipe", "kept"),
    [("hybrid", "delayed", True), ("e4m3", "blockwise", False), (None, "delayed", False)],
)
def test_which_scaling_keeps_histories(fp8, recipe, kept):
    assert keeps_histories(SimpleNamespace(fp8=fp8, fp8_recipe=recipe)) == kept
