"""A committee of teachers on one process: what it equals, what it refuses, extreme numbers."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_moe_inject.losses import (
    COMMITTEES,
    Dense,
    Mixed,
    Sparse,
    Student,
    measure_tokens,
    reference,
)
from megatron_moe_inject.losses.chunk_size import default_chunk_tokens
from megatron_moe_inject.losses.spec import TokenWeighting
from tests.harness.losses_cases import (
    HEADS,
    KINDS,
    VALID,
    FusedCase,
    assert_close,
    committee_case,
)


def _results(case, head="trained", **options):
    hidden, weight = case.leaves(head != "frozen")
    loss = case.call(hidden, weight, **case.promise(head), **options)
    loss.total.backward(case.upstream)
    return [*(part.detach() for part in loss), hidden.grad, weight.grad]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("by", COMMITTEES)
def test_one_teacher_is_that_teacher_bitwise(head, by):
    case = FusedCase.make(dtype=torch.float32, weighting=TokenWeighting("entropy", True))
    plain = _results(case, head)
    only = Mixed((case.target(),), (0.3,), by)
    case.teacher_hidden = case.teacher_weight = None
    for one, other in zip(plain, _results(case, head, target=only), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", COMMITTEES)
def test_equal_teachers_are_one(kind, by):
    case = FusedCase.make(kind=kind, weighting=TokenWeighting("label"))
    plain = _results(case)
    same = case.target()
    case.teacher_hidden = case.teacher_weight = None
    three = Mixed((same,) * 3, (0.2, 1.0, 4.0), by)
    for one, other in zip(plain, _results(case, target=three), strict=True):
        assert_close(other, one, by)


def test_weights_count_by_their_ratio_and_decide():
    case = committee_case()
    committee = case.options["target"]
    first = _results(case)[0]
    scaled = Mixed(committee.members, tuple(10 * w for w in committee.weights))
    assert_close(_results(case, target=scaled)[0], first, "scaled weights")
    other = Mixed(committee.members, committee.weights[::-1])
    assert (_results(case, target=other)[0] - first).abs().max() > 1e-3


def test_mixes_probabilities_and_not_logits():
    """Two teachers sure of different ids: the mixture is undecided between exactly these two."""
    head = torch.eye(4)
    members = tuple(Dense(40 * head[[i]], head) for i in (0, 1))
    undecided = Student(torch.zeros(1, 4), head, torch.tensor([1]))
    found = measure_tokens(undecided, Mixed(members, (3.0, 1.0)))
    assert found.teacher_top.item() == 0
    assert_close(found.teacher_loss, torch.tensor([4.0]).log(), "loss", 1e-6)
    expected = torch.tensor([3.0]).log() * 0.75  # log 4 + 0.75 log 0.75 + 0.25 log 0.25
    assert_close(found.kl, expected, "KL to the uniform student", 1e-6)


@pytest.mark.parametrize("by", COMMITTEES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_and_improbable_labels(by, dtype):
    """Confidences far below float32's smallest number still weigh the teachers by their ratio."""
    case = committee_case(by=by, weighting=TokenWeighting("label"), dtype=torch.float64)
    given = case.options["target"].members
    for_members = [Dense((60 * m.hidden).to(dtype), m.head.to(dtype)) for m in given]
    double = [Dense(m.hidden.double(), m.head.double()) for m in for_members]
    weights = (0.6, 0.4)
    case.options["target"] = Mixed(tuple(double), weights, by)
    wanted = case.dense()
    case.options["target"] = Mixed(tuple(for_members), weights, by)
    # Products of bfloat16 logits are rounded, so only float32 can be compared closely.
    hidden, weight = case.leaves()
    loss = case.call(hidden, weight)
    loss.total.sum().backward()
    assert loss.total.isfinite().all()
    assert hidden.grad.isfinite().all()
    if dtype == torch.float32:
        for name in ("kd", "kd_factor"):
            assert_close(getattr(loss, name), wanted[name], name, 2e-4)


@pytest.mark.parametrize("by", COMMITTEES)
def test_a_label_that_no_teacher_knows_leaves_the_weights(by):
    case = committee_case(by=by)
    hidden, weight = case.leaves(False)
    case.labels = torch.full_like(case.labels, VALID)  # padding: no probability anywhere
    padded = case.call(hidden, weight, beta=0.0)
    case.labels = torch.full_like(case.labels, -100)
    ignored = case.call(hidden, weight, beta=0.0)
    assert_close(padded.kd, ignored.kd, "divergence")


def test_blind_weights_do_not_know_the_label():
    case = committee_case(by="label")
    committee = case.options["target"]
    assert committee.blind().by == "fixed"
    top = Mixed(committee.members, committee.weights, "top")
    assert top.blind() is top


def test_chunks_leave_room_for_the_mixture():
    hidden, weight = torch.zeros(1 << 20, 1), torch.zeros(4096, 1)
    plain = default_chunk_tokens(hidden, weight)
    mixed = default_chunk_tokens(hidden, weight, mixed=True)
    assert 0.6 < mixed / plain < 0.7


def test_gradients_in_a_repeated_backward_pass():
    case = committee_case(by="top", weighting=TokenWeighting("entropy"))
    hidden, weight = case.leaves()
    loss = case.call(hidden, weight, chunk_tokens=4)
    loss.total.backward(case.upstream, retain_graph=True)
    first = weight.grad.clone()
    loss.total.backward(case.upstream)
    assert_close(weight.grad, 2 * first, "second backward pass")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": (1.0,)}, "2 teachers with 1 weights"),
        ({"weights": (1.0, 0.0)}, "positive"),
        ({"by": "loudest"}, "by='loudest' is not known"),
    ],
)
def test_committees_that_are_none(change, message):
    found = vars(committee_case().options["target"]) | change
    with pytest.raises(ValueError, match=message):
        Mixed(**found)


def test_members_are_of_the_same_tokens_and_ids():
    first = Dense(torch.ones(3, 2), torch.ones(5, 2))
    for other in (Dense(torch.ones(4, 2), first.head), Dense(first.hidden, torch.ones(6, 2))):
        with pytest.raises(ValueError, match="committee's teachers differ"):
            Mixed((first, other), (1.0, 1.0))


@pytest.mark.parametrize(
    ("others", "by", "message"),
    [
        ([{"tail": "bucket"}, {}], "fixed", r"tails \['bucket', 'renormalize'\] of a committee's"),
        ([{"temperature": 2.0}, {}], "fixed", r"temperatures \[1.0, 2.0\] of a committee's"),
        ([{"tail": "sample"}], "fixed", "drawn ids"),
        ([{}], "label", "does not know its probability of the label"),
        ([{"temperature": 2.0}], "top", "does not know its probability of the most likely id"),
    ],
)
def test_stored_members_that_do_not_go_together(others, by, message):
    ids = torch.zeros(3, 2).long()
    stored = tuple(Sparse(ids, torch.zeros(3, 2), **other) for other in others)
    members = (Dense(torch.ones(3, 2), torch.ones(5, 2)), *stored)
    with pytest.raises(ValueError, match=message):
        Mixed(members, (1.0,) * len(members), by)


def test_refusals():
    case = committee_case()
    hidden, weight = case.leaves()
    committee = case.options["target"]
    short = committee.changed(lambda states: states[:-1])
    with pytest.raises(ValueError, match=r"must have the tokens \(11,\) of the student's"):
        case.call(hidden, weight, target=short)
    narrow = Mixed(tuple(Dense(m.hidden, m.head[1:]) for m in committee.members), (1.0, 1.0))
    with pytest.raises(ValueError, match=r"v/p=24 as in the student's"):
        case.call(hidden, weight, target=narrow)


def test_reference_mixture_is_a_distribution():
    case = committee_case()
    teachers = [m.hidden @ m.head.t() for m in case.options["target"].members]
    labels = case.labels.clamp(max=8)
    for by in COMMITTEES:
        mixed = reference.mixture(teachers, (2.0, 1.0), labels, 3.0, by=by, valid_vocab_size=9)
        assert mixed.shape[-1] == 9
        assert_close(mixed.exp().sum(-1), torch.ones(len(case.labels)), "sum", 1e-10)


class _LargestBlock(TorchDispatchMode):
    """Notes the most rows of a block with ``columns`` columns that an operation gives."""

    def __init__(self, columns):
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.shape[1:] == (self.columns,):
            self.rows = max(self.rows, len(found))
        return found


@pytest.mark.parametrize("head", HEADS)
def test_no_block_is_larger_than_a_chunk(head):
    case = committee_case(t=40, h=3, by="label", weighting=TokenWeighting("entropy"))
    hidden, weight = case.leaves(head != "frozen")
    with _LargestBlock(VALID) as found:
        loss = case.call(hidden, weight, chunk_tokens=8, **case.promise(head))
        loss.total.backward(case.upstream)
    assert found.rows == 8
