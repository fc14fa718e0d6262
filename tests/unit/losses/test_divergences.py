"""vocab_parallel_divergence on one process: properties, edges, precision and misuse."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_inject.losses import rows as row_maths
from megatron_moe_inject.losses import vocab_parallel_divergence
from tests.harness.losses_cases import (
    KINDS,
    MIXTURE,
    REFERENCES,
    VALID,
    V,
    assert_close,
    logits,
    relative_error,
)

cases = settings(max_examples=40, derandomize=True)
anything = {
    "seed": st.integers(0, 10**6),
    "scale": st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    "temperature": st.floats(0.5, 8.0),
    "kind": st.sampled_from(KINDS),
    "v": st.integers(1, 40),
}


def _value_and_gradient(x, y, kind, upstream=None, **options):
    student = x.clone().requires_grad_()
    loss = vocab_parallel_divergence(student, y, kind=kind, **MIXTURE, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream
    return loss.detach(), torch.autograd.grad(loss, student, upstream)[0]


@cases
@given(**anything)
def test_matches_the_reference(seed, scale, temperature, kind, v):
    x, y = logits(seed, 3, v, scale=scale)
    whole = x.clone().requires_grad_()
    expected = REFERENCES[kind](whole, y, temperature=temperature)
    upstream = torch.randn(3, generator=torch.Generator().manual_seed(seed)).double()
    (expected_gradient,) = torch.autograd.grad(expected, whole, upstream)
    loss, gradient = _value_and_gradient(x, y, kind, upstream, temperature=temperature)
    assert_close(loss, expected, "loss")
    assert_close(gradient, expected_gradient, "gradient")


@cases
@given(**anything)
def test_properties(seed, scale, temperature, kind, v):
    x, y = logits(seed, 3, v, scale=scale)
    loss, gradient = _value_and_gradient(x, y, kind, temperature=temperature)
    assert (loss >= -1e-12 * max(1.0, scale)).all(), "negative"
    assert_close(gradient.sum(-1), torch.zeros(3), "a shift of all logits changes the loss", 1e-9)
    order = torch.randperm(v, generator=torch.Generator().manual_seed(seed))
    permuted, _ = _value_and_gradient(
        x[:, order] + 3.0, y[:, order] - 7.0, kind, temperature=temperature
    )
    assert_close(permuted, loss, "order and shift of the logits matter", 1e-9)
    if kind == "jsd":
        bound = temperature**2 * math.log(1 / 0.3)
        assert (loss <= bound).all(), "above its bound"


@cases
@given(seed=st.integers(0, 10**6), temperature=st.floats(0.5, 8.0), dtype=st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float16]))  # fmt: skip
def test_exactly_zero_where_both_sides_are_equal(seed, temperature, dtype):
    x, _ = logits(seed, 3, 33, dtype=dtype, scale=20.0)
    for kind in KINDS:
        loss, gradient = _value_and_gradient(x, x.clone(), kind, temperature=temperature)
        assert (loss == 0).all(), f"{kind}: {loss}"
        assert (gradient == 0).all(), f"{kind}: {gradient}"


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    x, y = logits(0, 4, 9)

    def loss(student):
        return vocab_parallel_divergence(
            student, y, kind=kind, temperature=1.7, valid_vocab_size=7, **MIXTURE
        )

    assert torch.autograd.gradcheck(loss, x.requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_naive(kind, dtype):
    x, y = logits(1, 64, 500, dtype=dtype, scale=3.0)
    exact = x.double().requires_grad_()
    expected = REFERENCES[kind](exact, y.double(), temperature=2.0)
    expected.sum().backward()

    naive = x.clone().requires_grad_()
    naive_loss = REFERENCES[kind](naive.float(), y.float(), temperature=2.0)
    naive_loss.sum().backward()

    loss, gradient = _value_and_gradient(x, y, kind, temperature=2.0)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    expected = expected.detach()
    assert relative_error(loss, expected) <= 1.1 * relative_error(naive_loss, expected) + 1e-7
    budget = relative_error(naive.grad, exact.grad)
    assert relative_error(gradient, exact.grad) <= 1.1 * budget + 1e-7


def test_blocks_of_rows_change_nothing(monkeypatch):
    x, y = logits(2, 29, V, dtype=torch.float32)
    for kind in KINDS:
        whole = _value_and_gradient(x, y, kind)
        monkeypatch.setitem(row_maths._BLOCK_ELEMENTS, "cpu", 4 * V)
        blocked = _value_and_gradient(x, y, kind)
        monkeypatch.undo()
        assert torch.equal(whole[0], blocked[0])
        assert torch.equal(whole[1], blocked[1])


def test_reverse_kl_is_infinite_where_the_teacher_excludes_a_possible_id():
    x, y = logits(3, 4, V)
    y[0, 5] = -torch.inf
    loss, gradient = _value_and_gradient(x, y, "reverse_kl")
    assert loss[0] == torch.inf
    assert loss[1:].isfinite().all()
    assert gradient[1:].isfinite().all()
    x[0, 5] = -torch.inf
    loss, gradient = _value_and_gradient(x, y, "reverse_kl")
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_ids_excluded_on_both_sides_are_padding(kind):
    x, y = logits(4, 4, V)
    masked = x.clone(), y.clone()
    for side in masked:
        side[:, VALID:] = -torch.inf
    expected = _value_and_gradient(x, y, kind, valid_vocab_size=VALID)
    loss, gradient = _value_and_gradient(*masked, kind)
    assert_close(loss, expected[0], "loss")
    assert_close(gradient, expected[1], "gradient")


def test_overwriting_the_logits_after_the_loss_does_no_harm():
    x, y = logits(5, 4, V, dtype=torch.float32)
    _, expected = _value_and_gradient(x, y, "forward_kl")
    student = x.clone().requires_grad_()
    scores = student * 1.0
    loss = vocab_parallel_divergence(scores, y, kind="forward_kl")
    with torch.no_grad():
        scores.zero_()
        y.zero_()
    loss.sum().backward()
    assert torch.equal(student.grad, expected)


def test_any_layout():
    x, y = logits(6, 4, 5, V)
    loss, gradient = _value_and_gradient(x, y, "jsd")
    strided = _value_and_gradient(x.transpose(0, 1), y.transpose(0, 1), "jsd")
    assert torch.equal(strided[0].t(), loss)
    assert torch.equal(strided[1].transpose(0, 1), gradient)
    row, row_gradient = _value_and_gradient(x[0, 0], y[0, 0], "jsd")
    assert row.shape == ()
    assert torch.equal(row_gradient, gradient[0, 0])
    empty, empty_gradient = _value_and_gradient(x[:0], y[:0], "jsd")
    assert empty.shape == (0, 5)
    assert empty_gradient.shape == (0, 5, V)


def test_no_gradient_work_without_need():
    x, y = logits(7, 4, V)
    assert not vocab_parallel_divergence(x, y, kind="jsd").requires_grad
    x.requires_grad_()
    with torch.no_grad():
        assert not vocab_parallel_divergence(x, y, kind="jsd").requires_grad
    y.requires_grad_()
    vocab_parallel_divergence(x, y, kind="jsd").sum().backward()
    assert y.grad is None, "the teacher is a constant"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "kl"}, "kind='kl'"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"kind": "jsd", "beta": 1.0}, "beta=1.0"),
        ({"kind": "skew_kl", "skew": 0.0}, "skew=0.0"),
        ({"valid_vocab_size": V + 1}, f"valid_vocab_size={V + 1}"),
        ({"valid_vocab_size": 0}, "valid_vocab_size=0"),
    ],
)
def test_misuse_is_named(wrong, message):
    x, y = logits(8, 4, V)
    with pytest.raises(ValueError, match=message):
        vocab_parallel_divergence(x, y, **{"kind": "forward_kl"} | wrong)


def test_shapes_must_agree():
    x, y = logits(9, 4, V)
    with pytest.raises(ValueError, match=r"\(4, 24\) and teacher_logits \(4, 23\)"):
        vocab_parallel_divergence(x, y[:, 1:], kind="forward_kl")
