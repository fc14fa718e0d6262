"""upstream_mask: the head's gradient formed in the forward pass, if the promise is kept.

Its values and gradients against the dense reference are beside those of the other ways, in
test_fused.py, test_main_grad.py and tests/parallel (test_losses_fused.py, test_losses_sparse.py).
"""

import pytest
import torch

from megatron_moe_inject.losses.upstream import common_factor
from tests.harness.losses_cases import KINDS, FusedCase, assert_close, relative_error

MASK = torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1])


def _gradients(case, mask, upstream, chunk=4, **options):
    hidden, weight = case.leaves()
    loss = case.call(hidden, weight, chunk_tokens=chunk, upstream_mask=mask, **options)
    loss.total.backward(upstream)
    return hidden.grad, weight.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_ordinary_way(kind, dtype):
    case = FusedCase.make(kind=kind, dtype=dtype)
    for mask in (MASK, MASK.long(), MASK.bool(), 2 - MASK):
        upstream = mask.float() / 7
        ordinary = _gradients(case, None, upstream)
        promised = _gradients(case, mask, upstream)
        assert torch.equal(promised[0], ordinary[0])
        limit = 1e-6 if dtype == torch.float32 else 6e-3
        assert relative_error(promised[1], ordinary[1].double()) < limit


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-24])
def test_loss_scaling(scale):
    case = FusedCase.make(dtype=torch.float32)
    case.upstream = MASK * scale
    expected = case.dense()
    hidden, weight = _gradients(case, MASK, case.upstream)
    assert relative_error(hidden, expected["hidden"]) < 1e-6
    assert relative_error(weight, expected["weight"]) < 1e-6


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("broken", ["one token", "masked token", "other sign", "nothing masked in"])
def test_a_broken_promise_makes_the_heads_gradient_nan(broken, accumulate):
    case, mask = FusedCase.make(), MASK.clone()
    case.upstream = mask.double() / 7
    if broken == "one token":
        case.upstream[2] *= 1.001
    elif broken == "masked token":
        case.upstream[1] = 1e-9
    elif broken == "other sign":
        case.upstream[3] *= -1
    else:
        mask.zero_()
    hidden, weight = case.leaves()
    weight.main_grad = torch.zeros_like(weight)
    loss = case.call(
        hidden, weight, chunk_tokens=4, upstream_mask=mask, accumulate_main_grad=accumulate
    )
    loss.total.backward(case.upstream)
    assert_close(hidden.grad, case.dense()["hidden"], "hidden gradient")
    assert (weight.main_grad if accumulate else weight.grad).isnan().all()


def test_a_frozen_head_needs_no_promise():
    case = FusedCase.make()
    hidden, weight = case.leaves(head_trains=False)
    case.call(hidden, weight, chunk_tokens=4, upstream_mask=MASK).total.backward(case.upstream)
    assert_close(hidden.grad, case.dense()["hidden"], "hidden gradient")


def test_only_the_head_trains():
    case = FusedCase.make()
    expected, (hidden, weight) = case.dense(), case.leaves()
    hidden.requires_grad_(False)
    case.call(hidden, weight, chunk_tokens=4, **case.promise()).total.backward(case.upstream)
    assert hidden.grad is None
    assert_close(weight.grad, expected["weight"], "head gradient")


@pytest.mark.parametrize("accumulate", [False, True])
def test_no_token_masked_in(accumulate):
    case, zeros = FusedCase.make(), torch.zeros(11)
    hidden, weight = case.leaves()
    weight.main_grad = torch.full_like(weight, 0.25)
    loss = case.call(hidden, weight, upstream_mask=zeros, accumulate_main_grad=accumulate)
    (loss.total * zeros).sum().backward()
    assert (hidden.grad == 0).all()
    if accumulate:
        assert (weight.main_grad == 0.25).all()
    else:
        assert (weight.grad == 0).all()


def test_the_sum_of_losses_multiplied_afterwards():
    """As Megatron does it: masked sum, then in-place divisions of the scalar, then a scale."""
    case = FusedCase.make(dtype=torch.float32)
    hidden, weight = case.leaves()
    loss = torch.sum(case.call(hidden, weight, upstream_mask=MASK).total.view(-1) * MASK)
    loss /= MASK.sum().int()
    loss /= 3
    (loss * 1024).backward()
    case.upstream = MASK / MASK.sum() / 3 * 1024
    assert_close(weight.grad, case.dense()["weight"], "head gradient", 1e-6)


def test_the_graph_goes_through_one_backward_pass():
    case = FusedCase.make()
    hidden, weight = case.leaves()
    total = case.call(hidden, weight, **case.promise()).total
    torch.autograd.grad(total, (hidden, weight), case.upstream, retain_graph=True)
    with pytest.raises(RuntimeError, match="leave it out where the graph is retained"):
        torch.autograd.grad(total, (hidden, weight), case.upstream)


def test_the_gradient_is_the_buffer_itself():
    """In float32 no second tensor of the head's size is made."""
    case = FusedCase.make(dtype=torch.float32)
    hidden, weight = case.leaves()
    total = case.call(hidden, weight, **case.promise()).total
    place = total.grad_fn.sums.of["head"].sum.data_ptr()
    total.backward(case.upstream)
    assert weight.grad.data_ptr() == place


FRACTIONS = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.01
FACTORS = {
    "zeros and ones": (MASK / 7, MASK, torch.float32, 1 / 7),
    "fractions": (FRACTIONS * -3.7, FRACTIONS, torch.float32, -3.7),
    "fractions, rounded": ((FRACTIONS / 3).bfloat16(), FRACTIONS, torch.bfloat16, 1 / 3),
    "fractions, rounded too far": ((FRACTIONS / 3).bfloat16(), FRACTIONS, torch.float32, None),
    "one off by 2 %": (torch.ones(1000).index_fill(0, torch.tensor(3), 1.02), torch.ones(1000),
                       torch.bfloat16, None),
    "a factor of 0": (torch.zeros(11), MASK, torch.float32, 0.0),
    "no token": (torch.zeros(0), torch.zeros(0), torch.float32, 0.0),
    "a mask of zeros": (torch.zeros(5), torch.zeros(5), torch.float32, 0.0),
    "something behind a mask of zeros": (torch.ones(5), torch.zeros(5), torch.float32, None),
    "an overflow": (torch.ones(2) * torch.inf, torch.ones(2), torch.float32, None),
    "a mask that is not finite": (torch.ones(2), torch.ones(2) * torch.inf, torch.float32, None),
}  # fmt: skip


@pytest.mark.parametrize(("upstream", "mask", "dtype", "expected"), FACTORS.values(), ids=FACTORS)
def test_common_factor(upstream, mask, dtype, expected):
    factor = common_factor(upstream, mask, dtype)
    assert factor.shape == ()
    if expected is None:
        assert factor.isnan()
    else:
        assert factor.item() == pytest.approx(expected, rel=1e-3 if dtype.itemsize == 2 else 1e-6)
