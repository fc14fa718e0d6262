"""vocab_parallel_divergence, sharded, against dense autograd: value and every rank's gradient."""

import pytest
import torch

from megatron_moe_inject.losses import vocab_parallel_divergence
from tests.harness import gloo
from tests.harness.losses_cases import (
    KINDS,
    MIXTURE,
    REFERENCES,
    VALID,
    V,
    assert_close,
    logits,
)

WORLD = 4


def _cut(whole, group, valid=VALID):
    """This rank's columns, NaN where they are padding: a padded column that is read shows."""
    whole = whole.clone()
    whole[..., valid:] = torch.nan
    width = whole.shape[-1] // group.size()
    return whole[..., group.rank() * width : (group.rank() + 1) * width].clone()


def _matches_dense(
    size, kind, temperature, scale=2.0, teacher=None, dtype=torch.float64, tol=1e-10
):
    group = gloo.block_group(size)
    x, y = logits(7, 3, 5, V, dtype=dtype, scale=scale)
    if teacher == "one_hot":
        y = torch.full_like(y, -torch.inf)
        y[..., 3] = 0.5
    elif teacher == "top_k":
        y[..., 4:14] = -torch.inf
    upstream = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(dtype)

    whole = x.to(torch.float64, copy=True).requires_grad_()
    expected = REFERENCES[kind](whole, y.double(), temperature=temperature, valid_vocab_size=VALID)
    (expected_gradient,) = torch.autograd.grad(expected, whole, upstream.double())

    student, teacher_part = _cut(x, group).requires_grad_(), _cut(y, group)
    before = student.detach().clone(), teacher_part.clone()
    loss = vocab_parallel_divergence(
        student, teacher_part, kind=kind, temperature=temperature, tp_group=group,
        valid_vocab_size=VALID, **MIXTURE,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, student, upstream)

    assert_close(loss, expected, "loss", tol)
    width = V // size
    start = group.rank() * width
    assert_close(gradient, expected_gradient[..., start : start + width], "gradient", tol)
    assert (gradient[..., max(0, VALID - start) :] == 0).all(), "padding got a gradient"
    for now, then in zip((student.detach(), teacher_part), before, strict=True):
        assert torch.equal(now.nan_to_num(), then.nan_to_num()), "an input was modified"
    return loss.detach()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_value_and_gradient(size, kind, temperature):
    losses = gloo.pool(WORLD).run(_matches_dense, size, kind, temperature)
    assert all(torch.equal(loss, losses[0]) for loss in losses[:size])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 4])
def test_extreme_logits(size, kind):
    gloo.pool(WORLD).run(_matches_dense, size, kind, 0.5, scale=1e4)
    gloo.pool(WORLD).run(_matches_dense, size, kind, 1.0, scale=1e4, dtype=torch.float32, tol=1e-6)


@pytest.mark.parametrize("teacher", ["one_hot", "top_k"])
@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "skew_kl"])
@pytest.mark.parametrize("size", [2, 4])
def test_teacher_excludes_ids_even_all_of_a_rank(size, kind, teacher):
    gloo.pool(WORLD).run(_matches_dense, size, kind, 2.0, teacher=teacher)


@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind):
    gloo.pool(WORLD).run(_matches_dense, 4, kind, 2.0, dtype=torch.float32, tol=2e-6)


def _equal_sides(dtype):
    group = gloo.block_group(WORLD)
    x = _cut(logits(3, 9, V, dtype=dtype, scale=5.0)[0], group)
    for kind in KINDS:
        student = x.clone().requires_grad_()
        loss = vocab_parallel_divergence(
            student, x, kind=kind, temperature=1.7, tp_group=group, valid_vocab_size=VALID,
            **MIXTURE,
        )  # fmt: skip
        loss.sum().backward()
        assert (loss == 0).all(), f"{kind}: loss {loss.abs().max()}"
        assert (student.grad == 0).all(), f"{kind}: gradient {student.grad.abs().max()}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_zero_where_both_sides_are_equal(dtype):
    gloo.pool(WORLD).run(_equal_sides, dtype)


def _collectives(kind):
    group = gloo.block_group(WORLD)
    x, y = (_cut(part, group) for part in logits(0, 9, V))
    with gloo.count_collectives() as counts:
        student = x.requires_grad_()
        vocab_parallel_divergence(
            student, y, kind=kind, tp_group=group, valid_vocab_size=VALID
        ).sum().backward()
    return dict(counts)


@pytest.mark.parametrize("kind", KINDS)
def test_runs_the_collectives_that_it_states(kind):
    expected = {"all_gather_into_tensor": 1}
    if kind in ("jsd", "skew_kl"):
        expected["all_reduce"] = 1
    assert gloo.pool(WORLD).run(_collectives, kind) == [expected] * WORLD
