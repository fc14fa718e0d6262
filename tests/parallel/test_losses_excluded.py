"""Ids that a teacher lacks get no probability from it, wherever a sharded vocabulary has them."""

from dataclasses import replace

import pytest
import torch

from megatron_moe_inject.losses import COMMITTEES, measure_tokens, reference
from megatron_moe_inject.losses.spec import LogitTransform, TokenWeighting
from tests.harness import gloo
from tests.harness.losses_cases import (
    HEADS,
    VALID,
    FusedCase,
    assert_close,
    committee_case,
    per_token,
)

WORLD = 4
FINITE = ("forward_kl", "jsd", "skew_kl")
# Of 4 shards of 6 ids: the whole first, the last of the second, one of the third.
EXCLUDED = torch.tensor([0, 1, 2, 3, 4, 5, 11, 14])
WHOLE = LogitTransform(0.5, 4.0, EXCLUDED)


def _case(by=None, **options) -> FusedCase:
    if by is None:
        return FusedCase.make(teacher_transform=WHOLE, **options)
    case = committee_case(by=by, **options)
    committee = case.options["target"]
    # The second knows what the first lacks, but for one id that none of them has.
    some = LogitTransform(excluded=torch.tensor([11, 16]))
    members = [
        replace(m, transform=t) for m, t in zip(committee.members, (WHOLE, some), strict=True)
    ]
    case.options["target"] = replace(committee, members=tuple(members))
    return case


def _matches_dense(size, **options):
    group = gloo.block_group(size)
    case = _case(**options)
    expected = case.dense()
    assert torch.isfinite(expected["kd"]).all()
    part = case.shard(group.rank(), size)
    for head in HEADS:
        hidden, weight = part.leaves(head != "frozen")
        loss = part.call(hidden, weight, tp_group=group, chunk_tokens=4, **part.promise(head))
        loss.total.backward(part.upstream)
        for name in ("total", "kd", "ce", "kd_factor"):
            assert_close(getattr(loss, name), expected[name], name)
        assert_close(hidden.grad, expected["hidden"], "hidden gradient")
        if head != "frozen":
            rows = expected["weight"].chunk(size)[group.rank()]
            assert_close(weight.grad, rows, "head gradient")


@pytest.mark.parametrize("by", [None, *COMMITTEES])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_losses_and_gradients(size, by):
    for kind in FINITE:
        gloo.pool(WORLD).run(_matches_dense, size, kind=kind, by=by)
    weighting = TokenWeighting("entropy" if by else "label", skip_worse=True)
    alpha = per_token(11, seed=1)
    gloo.pool(WORLD).run(_matches_dense, size, by=by, weighting=weighting, alpha=alpha)


def _measured(size):
    group = gloo.block_group(size)
    case = _case()
    part = case.shard(group.rank(), size)
    student = part.student(part.hidden, part.weight, group)
    found = measure_tokens(student, part.target(part.options["teacher_transform"]), chunk_tokens=4)
    student = (case.hidden @ case.weight.t())[:, :VALID]
    teacher = reference.transformed(case.teacher_hidden @ case.teacher_weight.t(), WHOLE)
    expected = reference.measures(student, teacher[:, :VALID], case.labels)
    lacking = torch.isin(case.labels, EXCLUDED)
    assert lacking.any()
    assert (found.teacher_loss[lacking] == torch.inf).all()
    for name, value in expected.items():
        assert_close(getattr(found, name)[~lacking], value[~lacking], name)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_measures(size):
    gloo.pool(WORLD).run(_measured, size)


def test_without_excluded_ids_the_transform_is_what_it_was():
    logits = torch.randn(3, 5)
    assert not LogitTransform()
    assert torch.equal(LogitTransform().apply_(logits.clone()), logits)
    assert torch.equal(LogitTransform(2.0).apply_(logits.clone()), 2 * logits)
