"""vocab_parallel_sparse_divergence on one process: what is its own beside
``test_every_divergence.py``, and beside the bucket's edges (``test_sparse_bucket.py``)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_inject.losses import vocab_parallel_sparse_divergence
from tests.harness.losses_cases import KINDS, REFERENCES, VALID, V, assert_close, logits
from tests.harness.losses_forms import STORED, Form
from tests.harness.losses_sparse_cases import store

cases = settings(max_examples=60, derandomize=True)
every_form = pytest.mark.parametrize("form", STORED, ids=str)


@cases
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    temperature=st.floats(0.5, 8.0),
    form=st.sampled_from(STORED),
    v=st.integers(1, 40),
    k=st.integers(1, 8),
)
def test_the_order_of_the_slots_does_not_matter(seed, scale, temperature, form, v, k):
    x, y = logits(seed, 4, v, scale=scale)
    ids, log_probs = form.teacher(y, min(k, v), temperature, seed=seed)
    loss, _ = form.value_and_gradient(x, (ids, log_probs), temperature=temperature)
    order = torch.randperm(ids.shape[-1], generator=torch.Generator().manual_seed(seed))
    again, _ = form.value_and_gradient(
        x, (ids[:, order], log_probs[:, order]), temperature=temperature
    )
    assert_close(again, loss, "loss", 1e-9)


@cases
@given(seed=st.integers(0, 10**6), temperature=st.floats(0.5, 8.0), kind=st.sampled_from(KINDS))
def test_a_store_of_everything_is_the_whole_divergence(seed, temperature, kind):
    x, y = logits(seed, 4, 12)
    stored = store(y, 12, temperature, seed=seed, unused=False)
    student = x.clone().requires_grad_()
    expected = REFERENCES[kind](student, y, temperature=temperature)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    for tail in ("bucket", "renormalize"):
        if tail == "bucket" or kind == "forward_kl":
            form = Form(kind, tail)
            loss, gradient = form.value_and_gradient(x, stored, temperature=temperature)
            assert_close(loss, expected, f"{tail} loss")
            assert_close(gradient, expected_gradient, f"{tail} gradient")


@every_form
def test_padding_is_not_in_the_rest(form):
    x, y = logits(4, 5, V)
    x[:, VALID:] = torch.nan
    stored = form.teacher(y, valid=VALID)
    expected = form.value_and_gradient(x[:, :VALID], stored)
    loss, gradient = form.value_and_gradient(x, stored, valid_vocab_size=VALID)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient[:, :VALID], expected[1])
    assert (gradient[:, VALID:] == 0).all(), "padding got a gradient"


@every_form
def test_an_id_that_no_store_should_have_shows(form):
    x, y = logits(5, 5, V)
    ids, log_probs = form.teacher(y, valid=VALID)
    ids[1, 1], ids[2, 2], ids[3, 3] = VALID, V + 100, VALID
    log_probs[1, 1] = log_probs[2, 2] = -40.0
    log_probs[3, 3] = -torch.inf  # unused: no harm
    expected = form.value_and_gradient(
        x, (ids.where(ids < VALID, -1), log_probs), valid_vocab_size=VALID
    )
    loss, gradient = form.value_and_gradient(x, (ids, log_probs), valid_vocab_size=VALID)
    assert (loss[1:3] == torch.inf).all()
    assert gradient[1:3, :VALID].isnan().all()
    assert torch.equal(loss[[0, 3, 4]], expected[0][[0, 3, 4]])
    assert torch.equal(gradient[[0, 3, 4]], expected[1][[0, 3, 4]])


@every_form
def test_a_repeated_id_shows_unless_it_was_sampled(form):
    x, _ = logits(6, 3, V)
    ids = torch.tensor([[3, 5, 3], [3, 5, 4], [3, 5, 3]])
    log_probs = torch.full((3, 3), 0.2, dtype=torch.float64).log()
    log_probs[2, 2] = -torch.inf
    loss, gradient = form.value_and_gradient(x, (ids, log_probs))
    assert loss[1:].isfinite().all()
    assert gradient[1:].isfinite().all()
    assert loss[0].isfinite() == (form.tail == "sample")
    assert gradient[0].isfinite().all() == (form.tail == "sample")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tail": "ghost"}, "tail='ghost' .* renormalize, bucket, sample"),
        ({"kind": "jsd"}, "kind='jsd' with tail='renormalize'.*use tail=\"bucket\""),
        ({"kind": "reverse_kl", "tail": "sample"}, "kind='reverse_kl' with tail='sample'.*bucket"),
    ],
)
def test_a_tail_that_does_not_go_with_the_kind_is_named(wrong, message):
    x, y = logits(14, 4, V)
    with pytest.raises(ValueError, match=message):
        vocab_parallel_sparse_divergence(x, *store(y, 3), **wrong)


def test_shapes_must_agree():
    x, y = logits(15, 4, V)
    ids, log_probs = store(y, 3)
    with pytest.raises(ValueError, match=r"ids \(4, 3\) and log_probs \(4, 2\)"):
        vocab_parallel_sparse_divergence(x, ids, log_probs[:, 1:])
    with pytest.raises(ValueError, match="at least one slot"):
        vocab_parallel_sparse_divergence(x, ids[:, :0], log_probs[:, :0])
    for part in (slice(1, None), (slice(None), 0)):
        with pytest.raises(ValueError, match=r"the tokens \(4,\) of the student's \(4, 24\)"):
            vocab_parallel_sparse_divergence(x, ids[part], log_probs[part])
    with pytest.raises(ValueError, match=r"ids are torch\.int32"):
        vocab_parallel_sparse_divergence(x, ids.int(), log_probs)
