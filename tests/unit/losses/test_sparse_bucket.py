"""The bucket of a stored teacher: where it is the whole divergence, and where sums would round."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.losses_cases import KINDS, REFERENCES, assert_close, logits
from tests.harness.losses_forms import Form
from tests.harness.losses_sparse_cases import store

cases = settings(max_examples=60, derandomize=True)
every_kind = pytest.mark.parametrize("bucket", [Form(kind, "bucket") for kind in KINDS], ids=str)


@every_kind
def test_a_bucket_of_one_id_is_the_whole_divergence(bucket):
    x, y = logits(1, 6, 9)
    stored = store(y, 8, 2.0, unused=False)
    student = x.clone().requires_grad_()
    expected = REFERENCES[bucket.kind](student, y, temperature=2.0)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    loss, gradient = bucket.value_and_gradient(x, stored, temperature=2.0)
    assert_close(loss, expected, "loss")
    assert_close(gradient, expected_gradient, "gradient")


@cases
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.5, 8.0),
    kind=st.sampled_from(KINDS),
    scale=st.sampled_from([0.0, 1.0, 20.0]),
    k=st.integers(1, 33),
)
def test_zero_in_a_bucket_where_both_sides_are_equal(seed, temperature, kind, scale, k):
    x, _ = logits(seed, 4, 33, dtype=torch.float32, scale=scale)
    stored = store(x, k, temperature, seed=seed, unused=False)
    loss, gradient = Form(kind, "bucket").value_and_gradient(x, stored, temperature=temperature)
    assert (loss.abs() <= 1e-7 * temperature**2).all(), loss
    assert (gradient.abs() <= 5e-7 * temperature).all(), gradient.abs().max()


@pytest.mark.parametrize("second", [-1, 2])
@every_kind
def test_a_confident_teacher_keeps_its_bucket(bucket, second):
    """1 - P and 1 - Q are below what float32 can tell from 0."""
    x = torch.tensor([[30.0, 1.0, 2.0, 3.0]])
    ids, log_probs = torch.tensor([[0, second]]), torch.tensor([[-1e-10, math.log(5e-11)]])
    log_probs = log_probs.double()
    expected = bucket.expected(x, (ids, log_probs))
    loss, gradient = bucket.value_and_gradient(x, (ids, log_probs.float()))
    if bucket.kind == "reverse_kl":  # counts as one rounding unit, so that it stays finite
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
        return
    assert_close(loss / expected[0], torch.ones(1), "loss", 1e-4)
    ratio = gradient[:, 1:] / expected[1][:, 1:]  # that of the id itself is a rounded difference
    assert_close(ratio, torch.ones(1, 3), "gradient", 1e-4)


@every_kind
def test_the_students_rest_does_not_cancel(bucket):
    """The teacher's bucket is large, the student's far below a rounding unit of 1."""
    x = torch.tensor([[90.0, 1.0, 2.0, 3.0]])
    ids, log_probs = torch.tensor([[0]]), torch.tensor([[0.25]]).log()
    expected = bucket.expected(x, (ids, log_probs))
    loss, gradient = bucket.value_and_gradient(x, (ids, log_probs))
    assert_close(loss, expected[0], "loss", 1e-6)
    assert_close(gradient, expected[1], "gradient", 1e-6)


@every_kind
def test_rounded_probabilities_above_one_are_scaled(bucket):
    x, _ = logits(2, 1, 6)
    ids = torch.tensor([[4, 1, 2]])
    log_probs = torch.tensor([[0.5, 0.4, 0.2]], dtype=torch.float64).log()
    expected = bucket.expected(x, (ids, log_probs - math.log(1.1)))
    loss, gradient = bucket.value_and_gradient(x, (ids, log_probs))
    assert loss.isfinite().all()
    assert_close(loss, expected[0], "loss", 1e-9)
    assert_close(gradient, expected[1], "gradient", 1e-9)


def test_reverse_kl_is_finite_where_the_store_leaves_nothing():
    x, _ = logits(3, 2, 6, dtype=torch.float32)
    ids, log_probs = torch.tensor([[4, -1], [4, 5]]), torch.tensor([[0.0, 0.0], [0.0, -200.0]])
    loss, gradient = Form("reverse_kl", "bucket").value_and_gradient(x, (ids, log_probs))
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    assert (gradient[0, [0, 1, 2, 3, 5]] > 0).all(), "the student's rest should shrink"
