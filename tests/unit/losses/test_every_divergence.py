"""What holds for every divergence on one process, from a whole teacher and from a stored one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_inject.losses import rows as row_maths
from tests.harness.losses_cases import V, assert_close, logits, relative_error
from tests.harness.losses_forms import FORMS

cases = settings(max_examples=100, derandomize=True)
anything = {
    "seed": st.integers(0, 10**6),
    "scale": st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    "temperature": st.floats(0.5, 8.0),
    "form": st.sampled_from(FORMS),
    "v": st.integers(1, 40),
    "k": st.integers(1, 8),
}
every_form = pytest.mark.parametrize("form", FORMS, ids=str)


@cases
@given(**anything)
def test_matches_the_reference(seed, scale, temperature, form, v, k):
    x, y = logits(seed, 4, v, scale=scale)
    teacher = form.teacher(y, min(k, v), temperature, seed=seed)
    upstream = torch.randn(4, generator=torch.Generator().manual_seed(seed)).double()
    expected = form.expected(x, teacher, upstream, temperature=temperature)
    loss, gradient = form.value_and_gradient(x, teacher, upstream, temperature=temperature)
    tolerance = 1e-10 if form.tail is None else 1e-9
    assert_close(loss, expected[0], "loss", tolerance)
    assert_close(gradient, expected[1], "gradient", tolerance)
    if form.tail is not None:
        assert loss[0] == 0, "a token without a used slot has a loss"
        assert (gradient[0] == 0).all(), "a token without a used slot has a gradient"


@cases
@given(**anything)
def test_it_is_bounded_and_a_shift_of_the_logits_changes_nothing(
    seed, scale, temperature, form, v, k
):
    x, y = logits(seed, 4, v, scale=scale)
    teacher = form.teacher(y, min(k, v), temperature, seed=seed)
    loss, gradient = form.value_and_gradient(x, teacher, temperature=temperature)
    least = -1e-12 * max(1.0, scale) if form.tail is None else 0
    assert (loss >= least).all(), "negative"
    assert_close(gradient.sum(-1), torch.zeros(4), "a shift of all logits changes the loss", 1e-9)
    again, _ = form.value_and_gradient(x + 3.0, teacher, temperature=temperature)
    assert_close(again, loss, "a shift of all logits matters", 1e-9)
    if form.kind == "jsd":
        assert (loss <= temperature**2 * math.log(1 / 0.3)).all(), "above its bound"


@every_form
def test_gradcheck(form):
    x, y = logits(0, 4, 9)
    teacher = form.teacher(y, 3, 1.7, valid=7)

    def loss(student):
        return form.loss(student, teacher, temperature=1.7, valid_vocab_size=7)

    assert torch.autograd.gradcheck(loss, x.requires_grad_())


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_naive(form, dtype):
    x, y = logits(1, 64, 500, dtype=dtype, scale=3.0)
    teacher = form.teacher(y if form.tail is None else y.float(), 16, 2.0)
    expected, expected_gradient = form.expected(x, teacher, temperature=2.0)

    naive = x.clone().requires_grad_()
    wide = tuple(t.float() if t.is_floating_point() else t for t in teacher)
    naive_loss = form.naive(naive.float(), wide, temperature=2.0)
    naive_loss.sum().backward()

    loss, gradient = form.value_and_gradient(x, teacher, temperature=2.0)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    budget = relative_error(naive_loss, expected)
    assert relative_error(loss, expected) <= 1.1 * budget + 1e-7
    budget = relative_error(naive.grad, expected_gradient)
    assert relative_error(gradient, expected_gradient) <= 1.1 * budget + 1e-7


@every_form
def test_blocks_of_rows_change_nothing(form, monkeypatch):
    x, y = logits(9, 29, V, dtype=torch.float32)
    teacher = form.teacher(y, 5)
    whole = form.value_and_gradient(x, teacher)
    monkeypatch.setitem(row_maths._BLOCK_ELEMENTS, "cpu", 4 * V)
    blocked = form.value_and_gradient(x, teacher)
    assert torch.equal(whole[0], blocked[0])
    assert torch.equal(whole[1], blocked[1])


@every_form
def test_inputs_are_left_as_they_are_and_may_change_afterwards(form):
    x, y = logits(11, 4, V, dtype=torch.float32)
    teacher = form.teacher(y)
    before = [part.clone() for part in (x, *teacher)]
    _, expected = form.value_and_gradient(x, teacher)
    student = x.clone().requires_grad_()
    scores = student * 1.0
    loss = form.loss(scores, teacher)
    for now, then in zip((scores.detach(), *teacher), before, strict=True):
        assert torch.equal(now, then), "an input was modified"
    with torch.no_grad():
        for part in (scores, *teacher):
            part.zero_()
    loss.sum().backward()
    assert torch.equal(student.grad, expected)


@every_form
def test_any_layout(form):
    x, y = logits(12, 4, 5, V)
    teacher = form.teacher(y, 3)
    loss, gradient = form.value_and_gradient(x, teacher)
    strided = form.value_and_gradient(x.transpose(0, 1), tuple(t.transpose(0, 1) for t in teacher))
    assert torch.equal(strided[0].t(), loss)
    assert torch.equal(strided[1].transpose(0, 1), gradient)
    row, row_gradient = form.value_and_gradient(x[1, 0], tuple(t[1, 0] for t in teacher))
    assert row.shape == ()
    assert torch.equal(row_gradient, gradient[1, 0])
    empty, empty_gradient = form.value_and_gradient(x[:0], tuple(t[:0] for t in teacher))
    assert empty.shape == (0, 5)
    assert empty_gradient.shape == (0, 5, V)


@every_form
def test_no_gradient_work_without_need(form):
    x, y = logits(13, 4, V)
    teacher = form.teacher(y, 3)
    assert not form.loss(x, teacher).requires_grad
    x.requires_grad_()
    with torch.no_grad():
        assert not form.loss(x, teacher).requires_grad
    teacher[-1].requires_grad_()
    form.loss(x, teacher).sum().backward()
    assert teacher[-1].grad is None, "the teacher is a constant"


@every_form
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "kl"}, "kind='kl'"),
        ({"temperature": 0.0}, r"temperature=0\.0"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"valid_vocab_size": V + 1}, f"valid_vocab_size={V + 1}"),
        ({"valid_vocab_size": 0}, "valid_vocab_size=0"),
    ],
)
def test_misuse_is_named(form, wrong, message):
    x, y = logits(14, 4, V)
    with pytest.raises(ValueError, match=message):
        form.loss(x, form.teacher(y, 3), **wrong)


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [("jsd", {"beta": 1.0}, r"beta=1\.0"), ("skew_kl", {"skew": 0.0}, r"skew=0\.0")],
)
def test_a_mixture_of_nothing_is_named(kind, wrong, message):
    x, y = logits(14, 4, V)
    forms = [form for form in FORMS if form.kind == kind]
    assert len(forms) == 2
    for form in forms:
        with pytest.raises(ValueError, match=message):
            form.loss(x, form.teacher(y, 3), **wrong)
