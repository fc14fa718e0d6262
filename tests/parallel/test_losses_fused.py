"""The fused loss with sharded heads against dense autograd: losses and all gradients."""

import itertools

import pytest
import torch
import torch.distributed as dist

from megatron_moe_inject.losses.spec import CONFIDENCES, LogitTransform, TokenWeighting
from tests.harness import gloo
from tests.harness.losses_cases import (
    HEADS,
    KINDS,
    VALID,
    FusedCase,
    V,
    assert_close,
    per_token,
)

WORLD = 4
T = 11


def _matches_dense(sizes, chunk, head, tol=1e-10, **options):
    """With the head over as many ranks as each of ``sizes`` says: the total and the hidden
    gradient of the last."""
    case = FusedCase.make(t=T, **options)
    expected = case.dense()
    for size in sizes:
        found = _matches(case, expected, size, chunk, head, tol)
    return found


def _matches(case, expected, size, chunk, head, tol):
    group = gloo.block_group(size)
    part = case.shard(group.rank(), size)
    hidden, weight = part.leaves(head != "frozen")
    before = [tensor.detach().clone() for tensor in (hidden, weight)]

    promise = part.promise(head)
    loss = part.call(hidden, weight, tp_group=group, chunk_tokens=chunk, **promise)
    loss.total.backward(part.upstream)

    for name in ("total", "kd", "ce", "kd_factor"):
        assert_close(getattr(loss, name), expected[name], name, tol)
    assert_close(hidden.grad, expected["hidden"], "hidden gradient", tol)
    if head != "frozen":
        width = V // size
        rows = expected["weight"][group.rank() * width : (group.rank() + 1) * width]
        assert_close(weight.grad, rows, "head gradient", tol)
    else:
        assert weight.grad is None
    for now, then in zip((hidden, weight), before, strict=True):
        assert torch.equal(now.detach().nan_to_num(), then.nan_to_num()), "an input was modified"
    return loss.total.detach(), hidden.grad


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_losses_and_gradients(size, kind, head):
    ranks = gloo.pool(WORLD).run(_matches_dense, (size,), 4, head, kind=kind)
    for total, hidden_grad in ranks[:size]:
        assert torch.equal(total, ranks[0][0]), "ranks disagree about the loss"
        assert torch.equal(hidden_grad, ranks[0][1]), "ranks disagree about the gradient"


@pytest.mark.parametrize("chunk", [1, 3, T, 64, None])
@pytest.mark.parametrize("head", HEADS)
def test_any_chunk_size(chunk, head):
    gloo.pool(WORLD).run(_matches_dense, (4,), chunk, head, kind="jsd")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 8.0, "per token"])
@pytest.mark.parametrize("head", HEADS)
def test_temperatures(temperature, head):
    if temperature == "per token":
        temperature = 0.5 + 7 * per_token(T)
    for kind in KINDS:
        gloo.pool(WORLD).run(_matches_dense, (4,), 4, head, kind=kind, temperature=temperature)


@pytest.mark.parametrize("head", HEADS)
def test_weights_per_token(head):
    weights = {"alpha": per_token(T, seed=1), "beta": per_token(T, seed=2)}
    gloo.pool(WORLD).run(_matches_dense, (4,), 4, head, **weights)
    gloo.pool(WORLD).run(_matches_dense, (2,), 4, head, alpha=0.0, beta=weights["beta"])


TRANSFORMS = {
    "scaled": LogitTransform(scale=0.25),
    "capped": LogitTransform(softcap=3.0),
    "both": LogitTransform(scale=2.0, softcap=5.0),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("head", HEADS)
def test_transformed_logits(transform, head):
    for kind in KINDS:
        gloo.pool(WORLD).run(
            _matches_dense, (1, 2, 4), 4, head, kind=kind,
            student_transform=transform, teacher_transform=LogitTransform(0.5, 4.0),
        )  # fmt: skip


@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("skip_worse", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_weighted_tokens(confidence, skip_worse, head):
    weighting = TokenWeighting(confidence, skip_worse)
    for kind in KINDS:
        gloo.pool(WORLD).run(
            _matches_dense, (1, 2, 4), 4, head, kind=kind, weighting=weighting,
            alpha=per_token(T, seed=1),
        )  # fmt: skip


@pytest.mark.parametrize("valid", [1, 6, VALID, V, None])
def test_any_padding(valid):
    for kind, head in itertools.product(KINDS, HEADS[1:]):
        gloo.pool(WORLD).run(_matches_dense, (4,), 4, head, kind=kind, valid=valid)


def test_float32():
    for kind, head in itertools.product(KINDS, HEADS[1:]):
        gloo.pool(WORLD).run(
            _matches_dense, (4,), 4, head, kind=kind, dtype=torch.float32, tol=5e-6
        )


def _unreduced(head):
    group = gloo.block_group(WORLD)
    case = FusedCase.make(t=T)
    part = case.shard(group.rank(), WORLD)
    hidden, weight = part.leaves(head != "frozen")
    loss = part.call(
        hidden, weight, tp_group=group, chunk_tokens=4, reduce_hidden_grad=False,
        **part.promise(head),
    )  # fmt: skip
    loss.total.backward(part.upstream)
    expected = case.dense()["hidden"]
    assert (hidden.grad - expected).abs().max() > 1e-3, "one rank's part equals the whole"
    dist.all_reduce(hidden.grad, group=group)
    assert_close(hidden.grad, expected, "sum of the ranks' parts")


@pytest.mark.parametrize("head", HEADS)
def test_unreduced_hidden_gradients_sum_to_the_whole(head):
    gloo.pool(WORLD).run(_unreduced, head)


class _GatherTokens(torch.autograd.Function):
    """Sequence-parallel gather, whose backward is a reduce-scatter."""

    @staticmethod
    def forward(ctx, part, group):
        ctx.group = group
        whole = part.new_empty(len(part) * group.size(), part.shape[1])
        dist.all_gather_into_tensor(whole, part, group=group)
        return whole

    @staticmethod
    def backward(ctx, gradient):
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(ctx.group.size())[ctx.group.rank()], None


def _sequence_parallel():
    group = gloo.block_group(WORLD)
    case = FusedCase.make(t=12)
    part = case.shard(group.rank(), WORLD)
    mine = case.hidden.chunk(WORLD)[group.rank()].clone().requires_grad_()
    loss = part.call(
        _GatherTokens.apply(mine, group), part.weight, tp_group=group, reduce_hidden_grad=False
    )
    loss.total.backward(part.upstream)
    expected = case.dense()["hidden"].chunk(WORLD)[group.rank()]
    assert_close(mine.grad, expected, "gradient of this rank's tokens")


def test_sequence_parallel():
    gloo.pool(WORLD).run(_sequence_parallel)


def _equal_sides(dtype):
    group = gloo.block_group(WORLD)
    case = FusedCase.make(t=T, beta=0.0, dtype=dtype).shard(group.rank(), WORLD)
    case.teacher_hidden, case.teacher_weight = case.hidden, case.weight
    for kind in KINDS:
        for head in HEADS:
            hidden, weight = case.leaves(head != "frozen")
            loss = case.call(
                hidden, weight, kind=kind, tp_group=group, chunk_tokens=4, **case.promise(head)
            )
            loss.total.backward(case.upstream)
            assert (loss.total == 0).all(), f"{kind}: {loss.total}"
            assert (hidden.grad == 0).all(), f"{kind}: {hidden.grad}"
            assert head == "frozen" or (weight.grad == 0).all(), f"{kind}: {weight.grad}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_zero_where_teacher_is_student(dtype):
    gloo.pool(WORLD).run(_equal_sides, dtype)


def _collectives(kind, head, reduce_hidden_grad):
    group = gloo.block_group(WORLD)
    case = FusedCase.make(t=T, kind=kind).shard(group.rank(), WORLD)
    hidden, weight = case.leaves(head != "frozen")
    with gloo.count_collectives() as counts:
        loss = case.call(
            hidden, weight, tp_group=group, chunk_tokens=4, reduce_hidden_grad=reduce_hidden_grad,
            **case.promise(head),
        )  # fmt: skip
        loss.total.backward(case.upstream)
    return dict(counts)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("reduce_hidden_grad", [False, True])
def test_runs_the_collectives_that_it_states(kind, head, reduce_hidden_grad):
    chunks = 3
    expected = {"all_gather_into_tensor": chunks}
    reduces = chunks * (kind == "jsd") + reduce_hidden_grad
    if reduces:
        expected["all_reduce"] = reduces
    counts = gloo.pool(WORLD).run(_collectives, kind, head, reduce_hidden_grad)
    assert counts == [expected] * WORLD


def _no_tokens():
    group = gloo.block_group(WORLD)
    case = FusedCase.make(t=0).shard(group.rank(), WORLD)
    for head in HEADS:
        hidden, weight = case.leaves(head != "frozen")
        loss = case.call(hidden, weight, tp_group=group, **case.promise(head))
        loss.total.sum().backward()
        assert loss.total.shape == loss.kd.shape == loss.ce.shape == (0,)
        assert hidden.grad.shape == hidden.shape
        assert head == "frozen" or (weight.grad == 0).all()


def test_no_tokens():
    gloo.pool(WORLD).run(_no_tokens)
