"""vocab_parallel_divergence on one process: what is its own beside ``test_every_divergence.py``."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_inject.losses import vocab_parallel_divergence
from tests.harness.losses_cases import VALID, V, assert_close, logits
from tests.harness.losses_forms import WHOLE, Form

cases = settings(max_examples=40, derandomize=True)
every_kind = pytest.mark.parametrize("form", WHOLE, ids=str)


@cases
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    temperature=st.floats(0.5, 8.0),
    form=st.sampled_from(WHOLE),
    v=st.integers(1, 40),
)
def test_the_order_of_ids_and_a_shift_of_both_sides_do_not_matter(
    seed, scale, temperature, form, v
):
    x, y = logits(seed, 3, v, scale=scale)
    loss, _ = form.value_and_gradient(x, (y,), temperature=temperature)
    order = torch.randperm(v, generator=torch.Generator().manual_seed(seed))
    permuted, _ = form.value_and_gradient(
        x[:, order] + 3.0, (y[:, order] - 7.0,), temperature=temperature
    )
    assert_close(permuted, loss, "loss", 1e-9)


@cases
@given(seed=st.integers(0, 10**6), temperature=st.floats(0.5, 8.0), dtype=st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float16]))  # fmt: skip
def test_exactly_zero_where_both_sides_are_equal(seed, temperature, dtype):
    x, _ = logits(seed, 3, 33, dtype=dtype, scale=20.0)
    for form in WHOLE:
        loss, gradient = form.value_and_gradient(x, (x.clone(),), temperature=temperature)
        assert (loss == 0).all(), f"{form}: {loss}"
        assert (gradient == 0).all(), f"{form}: {gradient}"


def test_reverse_kl_is_infinite_where_the_teacher_excludes_a_possible_id():
    form = Form("reverse_kl")
    x, y = logits(3, 4, V)
    y[0, 5] = -torch.inf
    loss, gradient = form.value_and_gradient(x, (y,))
    assert loss[0] == torch.inf
    assert loss[1:].isfinite().all()
    assert gradient[1:].isfinite().all()
    x[0, 5] = -torch.inf
    loss, gradient = form.value_and_gradient(x, (y,))
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


@every_kind
def test_ids_excluded_on_both_sides_are_padding(form):
    x, y = logits(4, 4, V)
    masked = x.clone(), y.clone()
    for side in masked:
        side[:, VALID:] = -torch.inf
    expected = form.value_and_gradient(x, (y,), valid_vocab_size=VALID)
    loss, gradient = form.value_and_gradient(masked[0], masked[1:])
    assert_close(loss, expected[0], "loss")
    assert_close(gradient, expected[1], "gradient")


def test_shapes_must_agree():
    x, y = logits(9, 4, V)
    with pytest.raises(ValueError, match=r"\(4, 24\) and teacher_logits \(4, 23\)"):
        vocab_parallel_divergence(x, y[:, 1:], kind="forward_kl")
