"""accumulate_main_grad keeps Megatron's contract of gradient accumulation fusion."""

from types import SimpleNamespace

import pytest
import torch

from tests.harness.losses_cases import HEADS, FusedCase, assert_close


def _run(case, weight, main_grad_dtype=torch.float32, head="trained"):
    weight.main_grad = torch.full(weight.shape, 0.25, dtype=main_grad_dtype)
    hidden = case.hidden.clone().requires_grad_()
    loss = case.call(
        hidden, weight, chunk_tokens=4, accumulate_main_grad=True, **case.promise(head)
    )
    assert (weight.main_grad == 0.25).all(), "nothing is added before the backward pass"
    loss.total.backward(case.upstream)
    return hidden.grad


@pytest.mark.parametrize("head", HEADS[1:])
@pytest.mark.parametrize("shared_with_embedding", [False, True])
def test_adds_to_main_grad_and_leaves_a_placeholder(shared_with_embedding, head):
    case = FusedCase.make(dtype=torch.float32)
    expected = case.dense()
    weight = torch.nn.Parameter(case.weight.clone())
    weight.grad_added_to_main_grad = False
    weight.zero_out_wgrad = shared_with_embedding
    hidden_grad = _run(case, weight, head=head)
    assert_close(weight.main_grad, expected["weight"] + 0.25, "main_grad", 1e-5)
    assert_close(hidden_grad, expected["hidden"], "hidden gradient", 1e-5)
    assert weight.grad_added_to_main_grad
    assert weight.grad.shape == weight.shape, "DDP's hook needs a gradient to fire on"
    if shared_with_embedding:
        assert (weight.grad == 0).all(), "DDP adds this to main_grad"


def test_a_weight_outside_ddp_gets_no_gradient():
    case = FusedCase.make(dtype=torch.float32)
    weight = torch.nn.Parameter(case.weight.clone())
    _run(case, weight)
    assert weight.grad is None
    assert_close(weight.main_grad, case.dense()["weight"] + 0.25, "main_grad", 1e-5)


@pytest.mark.parametrize("head", HEADS[1:])
@pytest.mark.parametrize("main_grad_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_weight(main_grad_dtype, head):
    case = FusedCase.make(dtype=torch.bfloat16, t=64)
    weight = torch.nn.Parameter(case.weight.clone())
    _run(case, weight, main_grad_dtype, head)
    assert weight.main_grad.dtype == main_grad_dtype
    expected = case.dense()["weight"] + 0.25
    assert_close(weight.main_grad, expected, "main_grad", 2e-2)


@pytest.mark.parametrize("head", ["frozen", "promised"])
def test_frozen_head_leaves_main_grad_alone(head):
    case = FusedCase.make(dtype=torch.float32)
    weight = torch.nn.Parameter(case.weight.clone(), requires_grad=False)
    weight.grad_added_to_main_grad = False
    _run(case, weight, head=head)
    assert (weight.main_grad == 0.25).all()
    assert not weight.grad_added_to_main_grad


@pytest.mark.parametrize("under_ddp", [False, True])
@pytest.mark.parametrize("zero_out", [False, True])
def test_same_as_megatrons_own_layer(monkeypatch, under_ddp, zero_out):
    """Megatron's linear layer and ours leave the same state on the weight."""
    layers = pytest.importorskip("megatron.core.tensor_parallel.layers")
    accumulate = SimpleNamespace(
        wgrad_gemm_accum_fp32=lambda x, dy, main_grad: main_grad.add_(dy.t() @ x)
    )
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", accumulate, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    case = FusedCase.make(dtype=torch.float32, valid=None, alpha=0.0, beta=1.0)

    def parameter():
        weight = torch.nn.Parameter(case.weight.clone())
        if under_ddp:
            weight.grad_added_to_main_grad = False
        weight.zero_out_wgrad = zero_out
        return weight

    ours, theirs = parameter(), parameter()
    hidden_grad = _run(case, ours)

    theirs.main_grad = torch.full(theirs.shape, 0.25)
    hidden = case.hidden.clone().requires_grad_()
    logits = layers.LinearWithGradAccumulationAndAsyncCommunication.apply(
        hidden, theirs, None, True, False, False, None, None, None, 1
    )
    loss = torch.nn.functional.cross_entropy(
        logits, case.labels, ignore_index=-100, reduction="none"
    )
    loss.backward(case.upstream)

    assert_close(hidden_grad, hidden.grad, "hidden gradient", 1e-5)
    assert_close(ours.main_grad, theirs.main_grad, "main_grad", 1e-5)
    assert (ours.grad is None) == (theirs.grad is None)
    flags = [getattr(w, "grad_added_to_main_grad", None) for w in (ours, theirs)]
    assert flags[0] == flags[1]
    if under_ddp and zero_out:
        assert torch.equal(ours.grad, theirs.grad)
