"""What this package relies on of Transformer Engine, on the device itself."""

import pytest
import torch

from megatron_moe_inject.experts.fp8 import blocks as fp8_blocks
from megatron_moe_inject.experts.fp8 import weights as fp8_weights
from megatron_moe_inject.experts.train.grouped import train_some
from megatron_moe_inject.recipe.schema import FP8_SCALINGS
from tests.harness.losses_cases import relative_error

te = pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
recipes = pytest.importorskip("transformer_engine.common.recipe")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EXPERTS, H, F, T = 4, 512, 768, 1024
RECIPES = {
    "bf16": None,
    "delayed": recipes.DelayedScaling,
    "tensorwise": recipes.Float8CurrentScaling,
    "blockwise": recipes.Float8BlockScaling,
}
NEAR = {"bf16": 5e-3, "delayed": 8e-2, "tensorwise": 8e-2, "blockwise": 6e-2}
"""Relative error of a product of normal numbers and of its gradient; E5M2 gradients err most."""


def _weights() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(F, H, device="cuda", dtype=torch.bfloat16) / 32 for _ in range(EXPERTS)]


def _grouped(weights, requires_grad=False):
    linear = te.GroupedLinear(EXPERTS, H, F, bias=False, params_dtype=torch.bfloat16)
    for i, weight in enumerate(weights):
        if not isinstance(weight, torch.nn.Parameter):
            weight = torch.nn.Parameter(weight.clone(), requires_grad=requires_grad)
        setattr(linear, f"weight{i}", weight)
    return linear


def _run(linear, recipe):
    """Output and gradient of the input, and both by plain products in fp32."""
    torch.manual_seed(1)
    rows = torch.randn(T, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(T, F, device="cuda", dtype=torch.bfloat16)
    with te.fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe and recipe()):
        output = linear(rows, [T // EXPERTS] * EXPERTS)
    output = output[0] if isinstance(output, tuple) else output
    output.backward(upstream)
    parts = zip(rows.detach().float().chunk(EXPERTS), _weights(), strict=True)
    expected = torch.cat([part @ weight.float().t() for part, weight in parts])
    parts = zip(upstream.float().chunk(EXPERTS), _weights(), strict=True)
    gradient = torch.cat([part @ weight.float() for part, weight in parts])
    return output.detach(), rows.grad, expected, gradient


@pytest.mark.parametrize("name", RECIPES)
def test_grouped_products(name):
    output, gradient, expected, expected_gradient = _run(_grouped(_weights()), RECIPES[name])
    assert relative_error(output, expected) < NEAR[name]
    assert relative_error(gradient, expected_gradient) < NEAR[name]


def _some_train(trains, *, fused=False, bias=False, scaling=None):
    """A grouped MLP's first layer, which returns a pair as Megatron's subclass does.

    With ``scaling`` the weights that do not train are in FP8 alone.
    """

    class Linear(te.GroupedLinear):
        def forward(self, x, m_splits):
            return super().forward(x, m_splits), None

    experts = torch.nn.Module()
    for name in ("linear_fc1", "linear_fc2"):
        linear = Linear(
            EXPERTS, H, F, bias=bias, params_dtype=torch.bfloat16, fuse_wgrad_accumulation=fused
        )
        for i, weight in enumerate(_weights()):
            getattr(linear, f"weight{i}").data.copy_(weight)
        for kind in ("weight", "bias")[: 1 + bias]:
            for i in range(EXPERTS):
                parameter = getattr(linear, f"{kind}{i}")
                parameter.requires_grad_(i in trains)
                if fused and kind == "weight" and i in trains:
                    parameter.main_grad = torch.ones_like(parameter, dtype=torch.float32)
                    parameter.grad_added_to_main_grad = False
        for i, weight in enumerate(_weights() if scaling else ()):
            if i not in trains:
                encoded = fp8_weights.encode(weight, scaling)
                kept = fp8_weights.parameter(encoded, torch.bfloat16, scaling)
                setattr(linear, f"weight{i}", kept)
        setattr(experts, name, linear)
    train_some(experts)
    return experts.linear_fc1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_weight_gradients_of_some_experts(name, fused, bias):
    """Those are of bf16 rows and gradients, whatever the layer multiplies in."""
    trains, counts, recipe = (1, 2), [256, 0, 512, 256], RECIPES[name]
    linear = _some_train(trains, fused=fused, bias=bias)
    torch.manual_seed(1)
    rows = torch.randn(T, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(T, F, device="cuda", dtype=torch.bfloat16)
    with te.fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe and recipe()):
        output, _ = linear(rows, counts)
    output.backward(upstream)
    parts = zip(upstream.float().split(counts), _weights(), strict=True)
    assert relative_error(rows.grad, torch.cat([g @ w.float() for g, w in parts])) < NEAR[name]
    pairs = list(
        zip(upstream.double().split(counts), rows.detach().double().split(counts), strict=True)
    )
    for i in range(EXPERTS):
        weight = getattr(linear, f"weight{i}")
        if i not in trains:
            assert weight.grad is None
            continue
        found = weight.main_grad - 1 if fused else weight.grad
        expected = pairs[i][0].t() @ pairs[i][1]
        assert relative_error(found, expected) < 5e-3 or not (expected.any() or found.any())
        if fused:
            assert weight.grad_added_to_main_grad
        if bias:
            torch.testing.assert_close(
                getattr(linear, f"bias{i}").grad.double(), pairs[i][0].sum(0), rtol=1e-2, atol=1e-1
            )


@pytest.mark.parametrize("trains", [(0,), (1, 3)])
@pytest.mark.parametrize("scaling", FP8_SCALINGS)
def test_weights_in_fp8_alone_beside_others(scaling, trains):
    """The first weight, which TE asks, is of either kind."""
    linear = _some_train(trains, scaling=scaling)
    output, gradient, expected, expected_gradient = _run(linear, RECIPES[scaling])
    assert relative_error(output, expected) < NEAR[scaling]
    assert relative_error(gradient, expected_gradient) < NEAR[scaling]
    for i in range(EXPERTS):
        weight = getattr(linear, f"weight{i}")
        assert (weight.grad is not None) == (i in trains)
        assert fp8_weights.is_fp8(weight) == (i not in trains)


def test_codes_are_those_of_te():
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine_torch import DType

    weight = _weights()[0]
    quantizer = Float8BlockQuantizer(DType.kFloat8E4M3, rowwise=True, columnwise=False)
    theirs, (codes, scales) = quantizer(weight), fp8_blocks.encode(weight)
    assert torch.equal(theirs._rowwise_data, codes.view(torch.uint8))
    assert torch.equal(theirs._rowwise_scale_inv[:, : scales.shape[1]], scales)


@pytest.mark.parametrize("scaling", FP8_SCALINGS)
def test_weights_in_fp8_alone(scaling):
    encoded = [fp8_weights.encode(weight, scaling) for weight in _weights()]
    kept = [fp8_weights.parameter(weight, torch.bfloat16, scaling) for weight in encoded]
    linear = _grouped(kept)
    output, gradient, expected, expected_gradient = _run(linear, RECIPES[scaling])
    assert relative_error(output, expected) < NEAR[scaling]
    assert relative_error(gradient, expected_gradient) < NEAR[scaling]
    for parameter, weight in zip(linear.parameters(), encoded, strict=True):
        assert parameter.get_usages()["columnwise"], "made for the gradient"
        fp8_weights.drop_transpose(parameter)
        assert not parameter.get_usages()["columnwise"]
        stored = fp8_weights.stored(parameter)
        assert torch.equal(stored.codes.view(torch.uint8), weight.codes.view(torch.uint8))
        assert torch.equal(stored.scales, weight.scales)


@pytest.mark.parametrize("scaling", FP8_SCALINGS)
def test_fp8_parameters_move_and_are_overwritten_in_place(scaling):
    first, second = (fp8_weights.encode(weight, scaling) for weight in _weights()[:2])
    holder = torch.nn.Module()
    holder.weight = parameter = fp8_weights.parameter(first, torch.bfloat16, scaling)
    holder.bfloat16().cuda()
    assert holder.weight is parameter
    address = fp8_weights.stored(parameter).codes.data_ptr()
    fp8_weights.overwrite(parameter, second)
    assert fp8_weights.stored(parameter).codes.data_ptr() == address
    assert torch.equal(parameter.dequantize(), second.decoded(torch.bfloat16))
