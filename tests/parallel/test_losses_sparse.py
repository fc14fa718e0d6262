"""vocab_parallel_sparse_divergence, sharded, against dense autograd: value and gradient."""

import pytest
import torch
import torch.distributed as dist

from megatron_moe_inject.losses import (
    Sparse,
    reference,
    vocab_parallel_sparse_divergence,
)
from megatron_moe_inject.losses.spec import LogitTransform
from tests.harness import gloo
from tests.harness.losses_cases import HEADS, MIXTURE, VALID, FusedCase, V, assert_close, logits
from tests.harness.losses_sparse_cases import TAIL_KINDS, stored_for

WORLD = 4


def _cut(whole, group):
    """This rank's columns, NaN where they are padding: a padded column that is read shows."""
    whole = whole.clone()
    whole[..., VALID:] = torch.nan
    width = whole.shape[-1] // group.size()
    return whole[..., group.rank() * width : (group.rank() + 1) * width].clone()


def _matches_dense(
    size, tail, kind, temperature, scale=2.0, ids_of=VALID, k=4, dtype=torch.float64, tol=1e-10
):
    group = gloo.block_group(size)
    x, y = logits(7, 3, 5, V, dtype=dtype, scale=scale)
    ids, log_probs = stored_for(tail, y, k, temperature, valid=ids_of)
    if ids_of != VALID:  # the teacher knows the other ids, too
        log_probs = log_probs - 0.5
    upstream = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    options = {"kind": kind, "tail": tail, "temperature": temperature, **MIXTURE}
    options["valid_vocab_size"] = VALID

    whole = x.to(torch.float64, copy=True).requires_grad_()
    expected = reference.sparse_divergence(whole, ids, log_probs.double(), **options)
    (expected_gradient,) = torch.autograd.grad(expected, whole, upstream.double())

    student = _cut(x, group).requires_grad_()
    before = student.detach().clone()
    loss = vocab_parallel_sparse_divergence(student, ids, log_probs, tp_group=group, **options)
    (gradient,) = torch.autograd.grad(loss, student, upstream)

    assert expected.detach().isfinite().all()
    assert_close(loss, expected, "loss", tol)
    width = V // size
    start = group.rank() * width
    assert_close(gradient, expected_gradient[..., start : start + width], "gradient", tol)
    assert (gradient[..., max(0, VALID - start) :] == 0).all(), "padding got a gradient"
    assert torch.equal(student.detach().nan_to_num(), before.nan_to_num()), "an input was modified"
    assert loss[0, 0] == 0
    assert (gradient[0, 0] == 0).all()
    return loss.detach()


def _same_bits(losses, size):
    """Every block of ranks computes the same case."""
    assert len(losses) == WORLD >= size
    return all(torch.equal(loss, losses[0]) for loss in losses)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 8.0])
@pytest.mark.parametrize(("tail", "kind"), TAIL_KINDS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_value_and_gradient(size, tail, kind, temperature):
    losses = gloo.pool(WORLD).run(_matches_dense, size, tail, kind, temperature)
    assert _same_bits(losses, size)


@pytest.mark.parametrize(("tail", "kind"), TAIL_KINDS)
@pytest.mark.parametrize("size", [2, 4])
def test_extreme_logits(size, tail, kind):
    run = gloo.pool(WORLD).run
    run(_matches_dense, size, tail, kind, 0.5, scale=1e4)
    run(_matches_dense, size, tail, kind, 1.0, scale=1e4, dtype=torch.float32, tol=1e-6)


@pytest.mark.parametrize(("tail", "kind"), TAIL_KINDS)
def test_ranks_without_any_of_the_ids(tail, kind):
    """All ids lie on the first rank; with k = 6 some of its rows have no column in the rest."""
    for k in (3, 6):
        gloo.pool(WORLD).run(_matches_dense, 4, tail, kind, 2.0, ids_of=6, k=k)


@pytest.mark.parametrize(("tail", "kind"), TAIL_KINDS)
def test_float32(tail, kind):
    losses = gloo.pool(WORLD).run(_matches_dense, 4, tail, kind, 2.0, dtype=torch.float32, tol=2e-6)
    assert _same_bits(losses, 4)


def _invalid(tail, kind):
    group = gloo.block_group(WORLD)
    x, y = logits(3, 3, V)
    ids, log_probs = stored_for(tail, y, 4, valid=VALID)
    ids[1, 1], log_probs[1, 1] = VALID, -50.0  # padding that a rank holds columns for
    student = _cut(x, group).requires_grad_()
    loss = vocab_parallel_sparse_divergence(
        student, ids, log_probs, kind=kind, tail=tail, tp_group=group, valid_vocab_size=VALID
    )
    loss.sum().backward()
    columns = max(0, min(VALID - group.rank() * V // WORLD, V // WORLD))
    assert (loss == torch.inf).tolist() == [False, True, False]
    assert student.grad[1, :columns].isnan().all()
    assert student.grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("tail", "kind"), TAIL_KINDS)
def test_an_id_in_the_padding_shows_on_every_rank(tail, kind):
    gloo.pool(WORLD).run(_invalid, tail, kind)


def _collectives(tail, kind):
    group = gloo.block_group(WORLD)
    x, y = logits(0, 9, V, dtype=torch.float32)
    sizes, gather = [], dist.all_gather_into_tensor

    def sized_gather(output, sent, **options):
        sizes.append(sent.numel())
        return gather(output, sent, **options)

    dist.all_gather_into_tensor = sized_gather
    try:
        with gloo.count_collectives() as counts:
            student = _cut(x, group).requires_grad_()
            vocab_parallel_sparse_divergence(
                student, *stored_for(tail, y, 4, valid=VALID), kind=kind, tail=tail,
                tp_group=group, valid_vocab_size=VALID,
            ).sum().backward()  # fmt: skip
    finally:
        dist.all_gather_into_tensor = gather
    return dict(counts), sizes


@pytest.mark.parametrize(("tail", "kind"), TAIL_KINDS)
def test_runs_the_collectives_that_it_states(tail, kind):
    expected = {"all_gather_into_tensor": 1}, [(4 + 2) * 9]
    assert gloo.pool(WORLD).run(_collectives, tail, kind) == [expected] * WORLD


def _fused_matches_dense(size, tail, kind, head, chunk, temperature, alpha, beta, transform):
    group = gloo.block_group(size)
    case = FusedCase.make(t=11, kind=kind, temperature=temperature, alpha=alpha, beta=beta)
    ids, log_probs = stored_for(tail, logits(9, 11, V)[1], 4, temperature, valid=VALID)
    hidden, weight = case.leaves()
    x = reference.transformed(hidden @ weight.t(), transform)
    kd = reference.sparse_divergence(
        *(x, ids, log_probs),
        **{"kind": kind, "tail": tail, "temperature": temperature, **MIXTURE},
        valid_vocab_size=VALID,
    )
    total = alpha * kd + beta * reference.cross_entropy(x, case.labels, valid_vocab_size=VALID)
    expected = torch.autograd.grad(total, (hidden, weight), case.upstream)

    part = case.shard(group.rank(), size)
    part.teacher_hidden = part.teacher_weight = None
    hidden, weight = part.leaves(head != "frozen")
    loss = part.call(
        *(hidden, weight),
        tp_group=group,
        chunk_tokens=chunk,
        student_transform=transform,
        target=Sparse(ids, log_probs, tail, temperature),
        **part.promise(head),
    )
    loss.total.backward(part.upstream)
    assert_close(loss.total, total, "total")
    assert_close(loss.kd, kd, "kd")
    assert_close(hidden.grad, expected[0], "hidden gradient")
    if head != "frozen":
        width = V // size
        rows = expected[1][group.rank() * width : (group.rank() + 1) * width]
        assert_close(weight.grad, rows, "head gradient")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("tail", "kind"), TAIL_KINDS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_fused_with_the_head(size, tail, kind, head):
    for alpha, beta in ((0.7, 0.3), (1.0, 0.0), (0.0, 1.0)):
        gloo.pool(WORLD).run(
            *(_fused_matches_dense, size, tail, kind, head, 4, 2.0, alpha, beta, None)
        )


@pytest.mark.parametrize("chunk", [1, 3, 11, None])
def test_fused_at_any_chunk_size_with_transformed_logits(chunk):
    transform = LogitTransform(0.5, 4.0)
    for head in HEADS:
        gloo.pool(WORLD).run(
            *(_fused_matches_dense, 2, "bucket", "jsd", head, chunk, 1.0, 0.7, 0.3),
            transform,
        )
