"""Heads with rows of their own, or a correction, against dense autograd through the whole head."""

import itertools

import pytest
import torch
import torch.distributed as dist

from megatron_moe_inject.losses import KINDS, Sparse, measure_tokens, reference
from megatron_moe_inject.losses.spec import CONFIDENCES, LogitTransform, TokenWeighting
from tests.harness import gloo
from tests.harness.losses_cases import (
    MIXTURE,
    VALID,
    FusedCase,
    V,
    assert_close,
    committee_case,
    logits,
    per_token,
)
from tests.harness.losses_head_cases import CHANGES, IDS, ChangedHead
from tests.harness.losses_sparse_cases import TAIL_KINDS, stored_for

WORLD = 4
T = 11
PROMISES = ("kept", "promised")


def _matches(size, change, head="kept", case=None, expected=None, ids=IDS, chunk=4, tol=1e-10,
             **options):  # fmt: skip
    """Losses, and gradients of hidden states and all that trains, on every rank."""
    group = gloo.block_group(size)
    case = FusedCase.make(t=T, **options) if case is None else case
    changed = ChangedHead.make(case, change, ids)
    if expected is None:
        expected = changed.applied(case).dense()
    part = case.shard(group.rank(), size)
    hidden, weight = part.leaves(head_trains=False)
    own = changed.shard(group.rank(), size, len(case.weight))
    if own.head_low_rank is not None:
        padding = torch.arange(len(case.weight))[own.ids] >= (case.options["valid_vocab_size"] or V)
        own.head_low_rank.b.data[padding] = torch.nan
    given = {"hidden": hidden, "weight": weight, **own.leaves}
    before = {name: tensor.detach().clone() for name, tensor in given.items()}

    loss = part.call(
        hidden, weight, tp_group=group, chunk_tokens=chunk, **own.options, **part.promise(head)
    )
    loss.total.backward(part.upstream)

    for name in ("total", "kd", "ce", "kd_factor"):
        if name in expected:
            assert_close(getattr(loss, name), expected[name], name, tol)
    assert_close(hidden.grad, expected["hidden"], "hidden gradient", tol)
    assert weight.grad is None
    for name, gradient in own.cut(changed.gradients(expected["weight"])).items():
        assert_close(own.leaves[name].grad, gradient, f"gradient of {name}", tol)
    for name, tensor in given.items():
        assert torch.equal(tensor.detach().nan_to_num(), before[name].nan_to_num()), name
    whole = [own.leaves["a"].grad] if "a" in own.leaves else []
    return [loss.total.detach(), hidden.grad, *whole]


@pytest.mark.parametrize("head", PROMISES)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_losses_and_gradients(size, change, head):
    for kind in KINDS:
        ranks = gloo.pool(WORLD).run(_matches, size, change, head, kind=kind)
        for found in ranks[1:size]:
            assert all(map(torch.equal, found, ranks[0])), "ranks disagree"


@pytest.mark.parametrize("head", PROMISES)
@pytest.mark.parametrize(
    "ids",
    [(), (7,), (8, 9), range(VALID), range(V), (17, 18, 23), (16, 17), (0, 23)],
    ids=["none", "one", "one rank's", "real", "all", "padding", "beside padding", "both ends"],
)
def test_any_rows(ids, head):
    for size in (1, 2, 4):
        gloo.pool(WORLD).run(_matches, size, "rows", head, ids=ids)


@pytest.mark.parametrize("valid", [1, 6, 7, VALID, V, None])
def test_any_padding(valid):
    for head, change, size in itertools.product(PROMISES, ("rows", "both"), (1, 4)):
        gloo.pool(WORLD).run(_matches, size, change, head, valid=valid)


@pytest.mark.parametrize("chunk", [1, 3, T, 64, None])
@pytest.mark.parametrize("head", PROMISES)
def test_any_chunk_size(chunk, head):
    for change in CHANGES:
        gloo.pool(WORLD).run(_matches, 4, change, head, chunk=chunk, kind="jsd")


OPTIONS = {
    "temperature 1": {"temperature": 1.0},
    "temperatures": {"temperature": 0.5 + 7 * per_token(T)},
    "weights per token": {"alpha": per_token(T, seed=1), "beta": per_token(T, seed=2)},
    "no distillation": {"alpha": 0.0},
    "no cross-entropy": {"beta": 0.0},
    "capped": {
        "student_transform": LogitTransform(scale=2.0, softcap=5.0),
        "teacher_transform": LogitTransform(0.5, 4.0),
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("head", PROMISES)
def test_options(options, head):
    for change, kind in (("rows", "forward_kl"), ("rows", "skew_kl"), ("both", "reverse_kl")):
        gloo.pool(WORLD).run(_matches, 2, change, head, kind=kind, **options)


@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("skip_worse", [False, True])
@pytest.mark.parametrize("head", PROMISES)
def test_weighted_tokens(confidence, skip_worse, head):
    weighting = TokenWeighting(confidence, skip_worse)
    for change, size in (("rows", 1), ("rows", 4), ("both", 2)):
        gloo.pool(WORLD).run(_matches, size, change, head, weighting=weighting)


@pytest.mark.parametrize("by", ["fixed", "label", "top"])
@pytest.mark.parametrize("head", PROMISES)
def test_a_committee(by, head):
    for change, kind in itertools.product(CHANGES, ("forward_kl", "jsd")):
        case = committee_case(by=by, t=T, kind=kind)
        gloo.pool(WORLD).run(_matches, 2, change, head, case)


def _sparse_case(tail, kind, change):
    """A case with a stored teacher, and what the reference makes of it."""
    case = FusedCase.make(t=T, kind=kind)
    stored = stored_for(tail, logits(9, T, V)[1], 4, 2.0, valid=VALID)
    case.options["target"] = Sparse(*stored, tail, temperature=2.0)
    case.teacher_hidden = case.teacher_weight = None
    hidden = case.hidden.clone().requires_grad_()
    weight = ChangedHead.make(case, change).applied(case).weight.requires_grad_()
    x = hidden @ weight.t()
    kd = reference.sparse_divergence(
        x, *stored, kind=kind, tail=tail, temperature=2.0, valid_vocab_size=VALID, **MIXTURE
    )
    total = 0.7 * kd + 0.3 * reference.cross_entropy(x, case.labels, valid_vocab_size=VALID)
    gradients = torch.autograd.grad(total, (hidden, weight), case.upstream)
    expected = {"total": total, "hidden": gradients[0], "weight": gradients[1]}
    return case, {name: tensor.detach() for name, tensor in expected.items()}


@pytest.mark.parametrize(("tail", "kind"), TAIL_KINDS)
def test_a_stored_teacher(tail, kind):
    for change, head in itertools.product(CHANGES, PROMISES):
        case, expected = _sparse_case(tail, kind, change)
        for size in (1, 4):
            gloo.pool(WORLD).run(_matches, size, change, head, case, expected)


def test_float32():
    for change, head, kind in itertools.product(CHANGES, PROMISES, KINDS):
        options = {"kind": kind, "dtype": torch.float32, "tol": 1e-5}
        gloo.pool(WORLD).run(_matches, 4, change, head, **options)


def _unreduced(head):
    group = gloo.block_group(WORLD)
    case = FusedCase.make(t=T)
    changed = ChangedHead.make(case, "both")
    expected = changed.applied(case).dense()
    part, own = case.shard(group.rank(), WORLD), changed.shard(group.rank(), WORLD, V)
    hidden, weight = part.leaves(head_trains=False)
    loss = part.call(
        hidden, weight, tp_group=group, chunk_tokens=4, reduce_hidden_grad=False,
        **own.options, **part.promise(head),
    )  # fmt: skip
    loss.total.backward(part.upstream)
    whole = {"hidden": expected["hidden"]} | changed.gradients(expected["weight"])
    for name, leaf in (("hidden", hidden), ("a", own.leaves["a"])):
        assert (leaf.grad - whole[name]).abs().max() > 1e-3, f"one rank's part of {name} is all"
        dist.all_reduce(leaf.grad, group=group)
        assert_close(leaf.grad, whole[name], f"sum of the ranks' parts of {name}")


@pytest.mark.parametrize("head", PROMISES)
def test_unreduced_gradients_sum_to_the_whole(head):
    gloo.pool(WORLD).run(_unreduced, head)


def _collectives(change, head, reduce_hidden_grad):
    group = gloo.block_group(WORLD)
    case = FusedCase.make(t=T)
    own = ChangedHead.make(case, change).shard(group.rank(), WORLD, V)
    part = case.shard(group.rank(), WORLD)
    with gloo.count_collectives() as counts:
        loss = part.call(
            *part.leaves(head_trains=False), tp_group=group, chunk_tokens=4,
            reduce_hidden_grad=reduce_hidden_grad, **own.options, **part.promise(head),
        )  # fmt: skip
        loss.total.backward(part.upstream)
    return dict(counts)


@pytest.mark.parametrize("reduce_hidden_grad", [False, True])
@pytest.mark.parametrize("head", PROMISES)
@pytest.mark.parametrize("change", CHANGES)
def test_runs_the_collectives_that_it_states(change, head, reduce_hidden_grad):
    expected = {"all_gather_into_tensor": 3}
    if reduce_hidden_grad:
        expected["all_reduce"] = 1 if change == "rows" else 2
    counts = gloo.pool(WORLD).run(_collectives, change, head, reduce_hidden_grad)
    assert counts == [expected] * WORLD


def _measured(size, change, ids, chunk=4, teacher=True, dtype=torch.float64, **transforms):
    group = gloo.block_group(size)
    case = FusedCase.make(t=T, dtype=dtype)
    changed = ChangedHead.make(case, change, ids)
    dense = changed.applied(case)
    x, y = (
        reference.transformed(states.double() @ head.double().t(), transforms.get(name))
        for states, head, name in (
            (dense.hidden, dense.weight, "student"),
            (case.teacher_hidden, case.teacher_weight, "teacher"),
        )
    )
    expected = reference.measures(x, y if teacher else None, case.labels, valid_vocab_size=VALID)
    part, own = case.shard(group.rank(), size), changed.shard(group.rank(), size, V)
    student = part.student(
        part.hidden, part.weight, group, transforms.get("student"), **own.options
    )
    target = part.target(transforms.get("teacher")) if teacher else None
    found = measure_tokens(student, target, chunk_tokens=chunk)
    for name, value in expected.items():
        if name.endswith("top"):
            assert torch.equal(getattr(found, name), value), name
        else:
            assert_close(getattr(found, name), value, name, 1e-10)


@pytest.mark.parametrize("change", CHANGES)
def test_measured_as_the_whole_head(change):
    capped = {"student": LogitTransform(2.0, 3.0), "teacher": LogitTransform(softcap=4.0)}
    for size, ids in itertools.product((1, 2, 4), (IDS, range(V))):
        gloo.pool(WORLD).run(_measured, size, change, ids)
    gloo.pool(WORLD).run(_measured, 2, change, IDS, chunk=None, teacher=False)
    gloo.pool(WORLD).run(_measured, 2, change, IDS, **capped)


def _no_tokens():
    group = gloo.block_group(WORLD)
    case = FusedCase.make(t=0)
    for change, head in itertools.product(CHANGES, PROMISES):
        own = ChangedHead.make(case, change).shard(group.rank(), WORLD, V)
        part = case.shard(group.rank(), WORLD)
        hidden, weight = part.leaves(head_trains=False)
        loss = part.call(hidden, weight, tp_group=group, **own.options, **part.promise(head))
        loss.total.sum().backward()
        for leaf in (hidden, *own.leaves.values()):
            assert leaf.grad.shape == leaf.shape
            assert (leaf.grad == 0).all()


def test_no_tokens():
    gloo.pool(WORLD).run(_no_tokens)


def _frozen_values(head_trains):
    """Values that do not train: what is measured, or beside a head of another recipe."""
    group = gloo.block_group(WORLD)
    case = FusedCase.make(t=T)
    changed = ChangedHead.make(case, "low rank" if head_trains else "both")
    expected = changed.applied(case).dense()
    own = changed.shard(group.rank(), WORLD, V, trains=False)
    part = case.shard(group.rank(), WORLD)
    hidden, weight = part.leaves(head_trains)
    loss = part.call(hidden, weight, tp_group=group, chunk_tokens=4, **own.options)
    loss.total.backward(part.upstream)
    assert_close(hidden.grad, expected["hidden"], "hidden gradient")
    assert all(leaf.grad is None for leaf in own.leaves.values())
    if head_trains:
        assert_close(weight.grad, expected["weight"][own.ids], "head gradient")


@pytest.mark.parametrize("head_trains", [False, True])
def test_what_does_not_train_changes_logits_all_the_same(head_trains):
    gloo.pool(WORLD).run(_frozen_values, head_trains)


def _hidden_frozen():
    group = gloo.block_group(WORLD)
    case = FusedCase.make(t=T)
    for change, head in itertools.product(CHANGES, PROMISES):
        changed = ChangedHead.make(case, change)
        expected = changed.gradients(changed.applied(case).dense()["weight"])
        own = changed.shard(group.rank(), WORLD, V)
        part = case.shard(group.rank(), WORLD)
        loss = part.call(
            part.hidden, part.weight, tp_group=group, chunk_tokens=4,
            **own.options, **part.promise(head),
        )  # fmt: skip
        loss.total.backward(part.upstream)
        for name, gradient in own.cut(expected).items():
            assert_close(own.leaves[name].grad, gradient, f"{change}: gradient of {name}")


def test_trains_above_frozen_states():
    gloo.pool(WORLD).run(_hidden_frozen)
