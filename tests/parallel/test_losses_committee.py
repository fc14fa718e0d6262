"""A committee of teachers with sharded heads against dense autograd: losses and all gradients."""

import pytest
import torch

from megatron_moe_inject.losses import COMMITTEES, measure_tokens, reference
from megatron_moe_inject.losses.spec import TokenWeighting
from tests.harness import gloo
from tests.harness.losses_cases import (
    HEADS,
    KINDS,
    VALID,
    V,
    assert_close,
    committee_case,
    per_token,
)

WORLD = 4
T = 11


def _matches_dense(size, chunk, heads=HEADS, tol=1e-10, **options):
    group = gloo.block_group(size)
    case = committee_case(**options)
    expected = case.dense()
    part = case.shard(group.rank(), size)
    found = []
    for head in heads:
        hidden, weight = part.leaves(head != "frozen")
        loss = part.call(hidden, weight, tp_group=group, chunk_tokens=chunk, **part.promise(head))
        loss.total.backward(part.upstream)
        for name in ("total", "kd", "ce", "kd_factor"):
            assert_close(getattr(loss, name), expected[name], name, tol)
        assert_close(hidden.grad, expected["hidden"], "hidden gradient", tol)
        if head != "frozen":
            rows = expected["weight"].chunk(size)[group.rank()]
            assert_close(weight.grad, rows, "head gradient", tol)
        found.append((loss.total.detach(), hidden.grad))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", COMMITTEES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_losses_and_gradients(size, by, kind):
    ranks = gloo.pool(WORLD).run(_matches_dense, size, 4, kind=kind, by=by)
    for rank in ranks[:size]:
        for one, other in zip(rank, ranks[0], strict=True):
            assert torch.equal(one[0], other[0]), "ranks disagree about the loss"
            assert torch.equal(one[1], other[1]), "ranks disagree about the gradient"


@pytest.mark.parametrize("confidence", ["none", "label", "entropy"])
@pytest.mark.parametrize("temperature", [1.0, 3.0, "per token"])
def test_weighted_tokens_use_the_mixture(confidence, temperature):
    if temperature == "per token":
        temperature = 0.5 + 3 * per_token(T)
    for by in COMMITTEES:
        gloo.pool(WORLD).run(
            _matches_dense, 4, 4, by=by, temperature=temperature, alpha=per_token(T, seed=1),
            weighting=TokenWeighting(confidence, skip_worse=True),
        )  # fmt: skip


@pytest.mark.parametrize("valid", [1, 6, V, None])
def test_any_padding(valid):
    gloo.pool(WORLD).run(_matches_dense, 4, 4, by="top", kind="jsd", valid=valid)


def test_three_teachers_float32_and_any_chunk():
    for chunk in (1, 3, None):
        gloo.pool(WORLD).run(
            _matches_dense, 2, chunk, by="label", widths=(3, 5, 8), dtype=torch.float32, tol=5e-6
        )


def test_no_tokens():
    gloo.pool(WORLD).run(_matches_dense, 4, 4, t=0, weighting=TokenWeighting("entropy"))


def _measured(size, by):
    group = gloo.block_group(size)
    case = committee_case(by=by)
    part = case.shard(group.rank(), size)
    student = part.student(part.hidden, part.weight, group)
    found = measure_tokens(student, part.options["target"], chunk_tokens=4)
    committee = case.options["target"]
    teachers = [reference.transformed(m.hidden @ m.head.t(), m.transform)
                for m in committee.members]  # fmt: skip
    mixed = reference.mixture(
        teachers, committee.weights, case.labels, 1.0, by=by, valid_vocab_size=VALID
    )
    student = (case.hidden @ case.weight.t())[:, :VALID]
    for name, value in reference.measures(student, mixed, case.labels).items():
        assert_close(getattr(found, name), value, name)


@pytest.mark.parametrize("by", COMMITTEES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_measures(size, by):
    gloo.pool(WORLD).run(_measured, size, by)


def _collectives(by, confidence):
    group = gloo.block_group(WORLD)
    case = committee_case(by=by, weighting=TokenWeighting(confidence) or None)
    case = case.shard(group.rank(), WORLD)
    counts = {}
    for head in HEADS:
        hidden, weight = case.leaves(head != "frozen")
        with gloo.count_collectives() as counted:
            loss = case.call(hidden, weight, tp_group=group, chunk_tokens=4, **case.promise(head))
            loss.total.backward(case.upstream)
        counts[head] = dict(counted)
    return counts


@pytest.mark.parametrize("confidence", ["none", "entropy"])
def test_runs_the_collectives_that_it_states(confidence):
    chunks, teachers, entropy = 3, 2, int(confidence == "entropy")
    once = {
        "all_gather_into_tensor": chunks * (1 + teachers),
        "all_reduce": chunks * entropy + 1,
    }
    again = {
        "all_gather_into_tensor": once["all_gather_into_tensor"] + (chunks - 1) * teachers,
        "all_reduce": once["all_reduce"] + (chunks - 1) * entropy,
    }
    expected = {"frozen": once, "trained": again, "promised": once}
    for counts in gloo.pool(WORLD).run(_collectives, "top", confidence):
        assert counts == expected
