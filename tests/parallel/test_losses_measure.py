"""measure_tokens with sharded heads against the dense reference."""

import pytest
import torch

from megatron_moe_inject.losses import Dense, Student, Vocabulary, measure_tokens, reference
from megatron_moe_inject.losses.spec import LogitTransform
from tests.harness import gloo
from tests.harness.losses_cases import VALID, FusedCase, V, assert_close

WORLD = 4
T = 11


def _measured(part, group, chunk=4, teacher=True, **transforms):
    student = part.student(part.hidden, part.weight, group, transforms.get("student_transform"))
    target = part.target(transforms.get("teacher_transform")) if teacher else None
    return measure_tokens(student, target, chunk_tokens=chunk)


def _expected(case, teacher=True, student_transform=None, teacher_transform=None):
    x = reference.transformed(case.hidden @ case.weight.t(), student_transform)
    y = reference.transformed(case.teacher_hidden @ case.teacher_weight.t(), teacher_transform)
    valid = case.options["valid_vocab_size"]
    return reference.measures(x, y if teacher else None, case.labels, valid_vocab_size=valid)


def _matches_dense(size, chunk=4, teacher=True, tol=1e-10, valid=VALID, t=T, dtype=torch.float64,
                   **transforms):  # fmt: skip
    group = gloo.block_group(size)
    case = FusedCase.make(t=t, valid=valid, dtype=dtype)
    expected = _expected(case, teacher, **transforms)
    found = _measured(case.shard(group.rank(), size), group, chunk, teacher, **transforms)
    for name, value in found._asdict().items():
        if name not in expected:
            assert value is None, name
        elif name.endswith("top"):
            assert torch.equal(value, expected[name]), name
        else:
            assert_close(value, expected[name], name, tol)
    return found.loss, found.confidence


@pytest.mark.parametrize("teacher", [True, False], ids=["teacher", "alone"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_it_is_the_reference(size, teacher):
    ranks = gloo.pool(WORLD).run(_matches_dense, size, teacher=teacher)
    for found in ranks[1:size]:
        for ours, first in zip(found, ranks[0], strict=True):
            assert torch.equal(ours, first), "ranks disagree"


@pytest.mark.parametrize("chunk", [1, 3, T, 64, None])
def test_any_chunk_size(chunk):
    gloo.pool(WORLD).run(_matches_dense, 4, chunk)


@pytest.mark.parametrize("valid", [1, 6, VALID, V, None])
def test_any_padding(valid):
    for size in (1, 2, 4):
        gloo.pool(WORLD).run(_matches_dense, size, valid=valid)


def test_transformed_logits():
    transforms = {
        "student_transform": LogitTransform(scale=0.25, softcap=3.0),
        "teacher_transform": LogitTransform(2.0, 4.0),
    }
    gloo.pool(WORLD).run(_matches_dense, 2, **transforms)


def test_no_token():
    gloo.pool(WORLD).run(_matches_dense, 2, t=0)


def test_float32():
    gloo.pool(WORLD).run(_matches_dense, 2, tol=1e-5, dtype=torch.float32)


def _ties(size):
    """All logits equal: the first id wins on every layout."""
    group = gloo.block_group(size)
    rows = V // size
    hidden, weight = torch.ones(3, 2), torch.ones(rows, 2)
    labels = torch.tensor([0, 5, 7])
    student = Student(hidden, weight, labels, Vocabulary(group, VALID))
    found = measure_tokens(student, Dense(hidden, weight))
    assert found.top.tolist() == found.teacher_top.tolist() == [0, 0, 0]
    assert torch.allclose(found.confidence, torch.full((3,), 1 / VALID))
    assert found.kl.abs().max() < 1e-6


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_first_of_equals_is_on_top(size):
    gloo.pool(WORLD).run(_ties, size)


def _collectives():
    group = gloo.block_group(2)
    part = FusedCase.make(t=T).shard(group.rank(), 2)
    with gloo.count_collectives() as counts:
        _measured(part, group, chunk=4)
    assert counts == {"all_gather_into_tensor": 3}


def test_one_exchange_for_each_chunk():
    gloo.pool(WORLD).run(_collectives)
