"""The fused loss on one process: work done, memory, precision, weights and misuse.

Values and gradients at TP 1, 2 and 4 are in tests/parallel/test_losses_fused.py.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.profiler import profile
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_moe_inject.losses import (
    Dense,
    Divergence,
    Sparse,
    Student,
    TermWeights,
    default_chunk_tokens,
    fused_linear_distillation,
    fused_loss,
    reference,
)
from megatron_moe_inject.losses.spec import TokenWeighting
from tests.harness.losses_cases import (
    HEADS,
    KINDS,
    REFERENCES,
    VALID,
    FusedCase,
    V,
    assert_close,
    per_token,
    relative_error,
)

STORED = Sparse(torch.zeros(11, 3).long(), torch.zeros(11, 3), temperature=2.0)


EVEN = VALID // 2 * 2
"""Ids of float64 that fill multiples of 16 bytes."""


def _operations(case, head="frozen", grad=True, hidden_trains=True, backward=True, chunk=4):
    """Number of matrix products, and the size of the largest tensor that any operation read."""
    hidden, weight = case.leaves(head != "frozen")
    hidden.requires_grad_(hidden_trains)
    with profile(record_shapes=True) as trace:
        with torch.set_grad_enabled(grad):
            loss = case.call(hidden, weight, chunk_tokens=chunk, **case.promise(head))
        if backward:
            loss.total.backward(case.upstream)
    events = trace.function_events
    products = sum(event.name in ("aten::mm", "aten::addmm") for event in events)
    shapes = [shape for event in events for shape in event.input_shapes or ()]
    return products, max(math.prod(shape) for shape in shapes)


@settings(max_examples=30, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    t=st.integers(1, 9),
    v=st.integers(2, 30),
    chunk=st.integers(1, 12),
    temperature=st.floats(0.5, 8.0),
    weights=st.tuples(st.floats(0, 2), st.floats(0, 2)),
    kind=st.sampled_from(KINDS),
    head=st.sampled_from(HEADS),
)
def test_matches_the_reference(seed, t, v, chunk, temperature, weights, kind, head):
    alpha, beta = weights
    case = FusedCase.make(
        seed, t=t, v=v, valid=v - 1, kind=kind, temperature=temperature, alpha=alpha, beta=beta
    )
    expected = case.dense()
    hidden, weight = case.leaves(head != "frozen")
    loss = case.call(hidden, weight, chunk_tokens=chunk, **case.promise(head))
    loss.total.backward(case.upstream)
    for name in ("total", "kd", "ce"):
        assert_close(getattr(loss, name), expected[name], name)
    assert_close(hidden.grad, expected["hidden"], "hidden gradient")
    if head != "frozen":
        assert_close(weight.grad, expected["weight"], "head gradient")


def test_work_per_chunk():
    """With columns that fill multiples of 16 bytes; else a small product goes with each."""
    assert _operations(FusedCase.make(t=11, valid=EVEN + 1))[0] == 2 * 9
    case, chunks = FusedCase.make(t=11, valid=EVEN), 3
    assert _operations(case)[0] == 3 * chunks
    again = chunks - 1  # the last chunk's logits are kept
    assert _operations(case, "trained")[0] == 4 * chunks + 2 * again
    assert _operations(case, "trained", hidden_trains=False)[0] == 3 * chunks + 2 * again
    assert _operations(case, "promised")[0] == 4 * chunks
    assert _operations(case, "promised", hidden_trains=False)[0] == 3 * chunks
    assert _operations(case, "promised", backward=False)[0] == 4 * chunks
    for head in HEADS:
        assert _operations(case, head, grad=False, backward=False)[0] == 2 * chunks
    assert _operations(case, hidden_trains=False, backward=False)[0] == 2 * chunks
    reported_only = FusedCase.make(t=11, valid=EVEN, alpha=0.0)
    assert _operations(reported_only, "trained")[0] == 4 * chunks + again
    assert _operations(reported_only, "promised")[0] == 4 * chunks


def test_second_backward_pass_through_a_retained_graph():
    case = FusedCase.make(t=11)
    hidden, weight = case.leaves(True)
    total = case.call(hidden, weight, chunk_tokens=4).total
    first = torch.autograd.grad(total, (hidden, weight), case.upstream, retain_graph=True)
    second = torch.autograd.grad(total, (hidden, weight), case.upstream)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_no_teacher_no_teacher_work():
    case, chunks = FusedCase.make(t=11, valid=EVEN, alpha=0.0, beta=1.3), 3
    expected = case.dense()
    case.teacher_hidden = case.teacher_weight = None
    assert _operations(case)[0] == 2 * chunks
    for head in HEADS:
        hidden, weight = case.leaves(head != "frozen")
        loss = case.call(hidden, weight, chunk_tokens=4, **case.promise(head))
        loss.total.backward(case.upstream)
        assert (loss.kd == 0).all()
        assert_close(loss.total, expected["total"], "total")
        assert_close(hidden.grad, expected["hidden"], "hidden gradient")
        if head != "frozen":
            assert_close(weight.grad, expected["weight"], "head gradient")


@pytest.mark.parametrize("head", HEADS)
def test_full_logits_never_exist(head):
    case = FusedCase.make(t=64, h=4, h_t=4, v=640, valid=640)
    _, largest = _operations(case, head, chunk=8)
    assert largest == 8 * 640, "something larger than a chunk of logits"


def _errors(kind, head, seed=0, valid=500, masked=False):
    """Relative errors in bfloat16, by name: ours, and of the naive path.

    ``masked``: the gradient from above is one number or 0, as from a loss mask.
    """
    case = FusedCase.make(
        seed=seed, t=96, h=64, h_t=32, v=512, valid=valid, kind=kind, dtype=torch.bfloat16,
        alpha=per_token(96), beta=per_token(96, seed=6),
    )  # fmt: skip
    case.weight, case.teacher_weight = case.weight / 8, case.teacher_weight / 4
    if masked:
        case.upstream = torch.where(case.upstream > -0.5, -0.3, 0.0)
    expected = case.dense()

    naive_hidden, naive_weight = case.leaves()
    x = (naive_hidden @ naive_weight.t()).float()
    y = (case.teacher_hidden @ case.teacher_weight.t()).float()
    kd = REFERENCES[kind](x, y, temperature=2.0, valid_vocab_size=valid)
    ce = reference.cross_entropy(x, case.labels, valid_vocab_size=valid)
    naive_total = case.options["alpha"].float() * kd + case.options["beta"].float() * ce
    naive_total.backward(case.upstream)

    hidden, weight = case.leaves(head != "frozen")
    loss = case.call(hidden, weight, chunk_tokens=32, **case.promise(head))
    loss.total.backward(case.upstream)
    assert loss.total.dtype == torch.float32
    pairs = {"total": (loss.total, naive_total), "hidden": (hidden.grad, naive_hidden.grad)}
    if head != "frozen":
        pairs["weight"] = (weight.grad, naive_weight.grad)
    return {
        name: tuple(relative_error(found, expected[name]) for found in both)
        for name, both in pairs.items()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_is_no_worse_than_naive(kind, head):
    for name, (error, budget) in _errors(kind, head).items():
        assert error <= 1.1 * budget, f"{name}: error {error:.3g}, naive path {budget:.3g}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["frozen", "promised"])
@pytest.mark.parametrize("valid", [504, 500])
def test_bfloat16_under_a_loss_mask_is_as_exact_as_naive(kind, head, valid):
    """The ratio of errors swings with the numbers: the mean of several."""
    found = [_errors(kind, head, seed, valid, masked=True) for seed in range(6)]
    for name in found[0]:
        ratios = [errors[name][0] / errors[name][1] for errors in found]
        assert sum(ratios) / len(ratios) <= 1.05, (name, ratios)


@pytest.mark.parametrize("head_trains", [False, True])
def test_tokens_of_weight_zero_contribute_nothing_whatever_the_teacher_says(head_trains):
    alpha = torch.tensor([0.0, 0.5, 0.0, 1.0, 0.0])
    case = FusedCase.make(t=5, alpha=alpha, kind="reverse_kl")
    expected = case.dense()
    case.teacher_hidden = case.teacher_hidden.masked_fill((alpha == 0)[:, None], torch.nan)
    hidden, weight = case.leaves(head_trains)
    loss = case.call(hidden, weight, chunk_tokens=2)
    loss.total.backward(case.upstream)
    assert_close(loss.total, expected["total"], "total")
    assert_close(hidden.grad, expected["hidden"], "hidden gradient")
    if head_trains:
        assert_close(weight.grad, expected["weight"], "head gradient")


@pytest.mark.parametrize("zero", [0.0, torch.zeros(11)])
def test_all_weights_zero(zero):
    case = FusedCase.make(t=11, alpha=zero, beta=zero)
    expected = case.dense()
    hidden, weight = case.leaves()
    loss = case.call(hidden, weight)
    loss.total.backward(case.upstream)
    assert_close(loss.kd, expected["kd"], "kd is reported")
    assert_close(loss.ce, expected["ce"], "ce is reported")
    for zeros in (loss.total, hidden.grad, weight.grad):
        assert (zeros == 0).all()


@pytest.mark.parametrize("head_trains", [False, True])
def test_upstream_zero_masks_the_token(head_trains):
    case = FusedCase.make(t=11)
    case.upstream[3:] = 0
    hidden, weight = case.leaves(head_trains)
    case.call(hidden, weight, chunk_tokens=2).total.backward(case.upstream)
    assert (hidden.grad[3:] == 0).all()
    assert (hidden.grad[:3] != 0).any(-1).all()


def test_labels_outside_the_vocabulary_cannot_go_unseen():
    case = FusedCase.make(t=4)
    case.labels = torch.tensor([0, VALID, V, -1])
    ce = case.call(*case.leaves()).ce
    assert ce[0].isfinite()
    assert (ce[1:3] == torch.inf).all()
    assert ce[3] == 0


def test_all_labels_ignored():
    case = FusedCase.make(t=5, alpha=0.0, beta=1.0)
    case.labels = torch.full((5,), -100)
    hidden, weight = case.leaves()
    loss = case.call(hidden, weight)
    loss.total.backward(case.upstream)
    for zeros in (loss.total, loss.ce, hidden.grad, weight.grad):
        assert (zeros == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_trains", [False, True])
def test_extreme_logits_in_float32(kind, head_trains):
    case = FusedCase.make(kind=kind, dtype=torch.float32)
    case.hidden, case.teacher_hidden = case.hidden * 3e3, case.teacher_hidden * 3e3
    expected = case.dense()
    assert (case.hidden @ case.weight.t()).abs().max() > 1e4
    hidden, weight = case.leaves(head_trains)
    loss = case.call(hidden, weight)
    loss.total.backward(case.upstream)
    assert_close(loss.total, expected["total"], "total", 1e-6)
    assert_close(hidden.grad, expected["hidden"], "hidden gradient", 1e-5)
    if head_trains:
        assert_close(weight.grad, expected["weight"], "head gradient", 1e-5)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "skew_kl"])
def test_one_hot_teacher(kind):
    case = FusedCase.make(kind=kind, dtype=torch.float32)
    case.teacher_hidden = torch.ones(11, 1)
    case.teacher_weight = torch.zeros(V, 1).index_fill_(0, torch.tensor([5]), 1e4)
    expected = case.dense()
    hidden, weight = case.leaves()
    loss = case.call(hidden, weight)
    loss.total.backward(case.upstream)
    assert_close(loss.kd, expected["kd"], "kd", 1e-5)
    assert_close(hidden.grad, expected["hidden"], "hidden gradient", 1e-5)
    assert_close(weight.grad, expected["weight"], "head gradient", 1e-5)


def test_deterministic_and_repeatable():
    case = FusedCase.make(t=33, dtype=torch.float32)
    results = []
    for _ in range(2):
        hidden, weight = case.leaves()
        loss = case.call(hidden, weight, chunk_tokens=8)
        for _ in range(2):
            grads = torch.autograd.grad(loss.total, (hidden, weight), case.upstream, True)
            results.append((loss.total.detach(), *grads))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    with torch.no_grad():
        assert torch.equal(case.call(case.hidden, case.weight, chunk_tokens=8).total, results[0][0])


def test_parts_are_detached():
    case = FusedCase.make()
    loss = case.call(*case.leaves())
    assert loss.total.requires_grad
    assert not loss.kd.requires_grad
    assert not loss.ce.requires_grad


@pytest.mark.parametrize(("t", "v"), [(1, 8), (1000, 32768), (1024, 128256), (7, 10**9), (0, 8)])
def test_default_chunk_keeps_its_budget(t, v):
    hidden, weight = torch.empty(t, 1, device="meta"), torch.empty(v, 1, device="meta")
    chunk = default_chunk_tokens(hidden, weight)
    assert chunk >= 1
    assert chunk == 1 or chunk * v * 2 * 4 <= 512 << 20
    assert chunk < max(t, 1) + 64


def test_default_chunk_grows_with_a_head_gradient_summed_in_the_forward_pass():
    hidden, weight = torch.empty(10**6, 1024), torch.empty(1 << 17, 1024, device="meta")
    assert default_chunk_tokens(hidden, weight) == 64
    assert default_chunk_tokens(hidden, weight, head_gradient=True) == 128
    assert default_chunk_tokens(hidden, weight.bfloat16(), head_gradient=True) == 256
    few = torch.empty(1 << 13, 64, device="meta")
    budget = default_chunk_tokens(hidden, few)
    assert default_chunk_tokens(hidden, few, head_gradient=True) == budget


def test_the_documented_function_is_the_loss_of_one_teacher_bitwise():
    case = FusedCase.make(kind="jsd", dtype=torch.float32)
    found = []
    for way in ("objects", "arguments"):
        hidden, weight = case.leaves()
        if way == "objects":
            student = case.student(hidden, weight)
            weights = TermWeights(0.7, 0.3, Divergence("jsd"), 2.0)
            loss = fused_loss(student, case.target(), weights)
        else:
            loss = fused_linear_distillation(
                hidden, weight, case.teacher_hidden, case.teacher_weight, case.labels,
                **case.options,
            )  # fmt: skip
        loss.total.backward(case.upstream)
        found.append([*loss, hidden.grad, weight.grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_what_a_call_kept_is_free_after_its_backward_pass():
    """The teacher's states among it, where the logits were made again."""
    case = FusedCase.make()
    hidden, weight = case.leaves()
    teacher = StorageWeakRef(case.teacher_hidden.untyped_storage())
    total = case.call(hidden, weight, chunk_tokens=4).total
    case.teacher_hidden = None
    assert not teacher.expired()
    total.backward(case.upstream)
    assert teacher.expired()
    assert total.grad_fn is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_hidden": torch.zeros(11, 5)}, r"student's hidden \(11, 5\)"),
        ({"student_hidden": torch.zeros(11, 6).half()}, "student's hidden is torch.float16"),
        ({"student_hidden": torch.zeros(11, 1, 6).double()}, r"labels \(11,\)"),
        ({"teacher_weight": torch.zeros(V - 1, 4).double()}, r"teacher's head \(23, 4\)"),
        ({"teacher_weight": torch.zeros(V, 5).double()}, r"and head \(24, 5\)"),
        ({"teacher_hidden": torch.zeros(9, 4).double()}, r"\[\(9, 4\)\], must have the tokens"),
        ({"teacher_hidden": torch.zeros(11, 4)}, "teacher's hidden is torch.float32"),
        ({"teacher_hidden": None}, "together"),
        ({"teacher_hidden": None, "teacher_weight": None}, "alpha"),
        ({"labels": torch.zeros(10).long()}, r"labels \(10,\)"),
        ({"alpha": torch.zeros(10)}, r"alpha \(10,\)"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"chunk_tokens": 0}, "chunk_tokens=0"),
        ({"kind": "tv"}, "kind='tv'"),
        ({"valid_vocab_size": V + 1}, f"valid_vocab_size={V + 1}"),
    ],
)
def test_misuse_is_named(change, message):
    case = FusedCase.make()
    arguments = {
        "student_hidden": case.hidden,
        "student_weight": case.weight,
        "teacher_hidden": case.teacher_hidden,
        "teacher_weight": case.teacher_weight,
        "labels": case.labels,
    }
    with pytest.raises(ValueError, match=message):
        fused_linear_distillation(**arguments | case.options | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"upstream_mask": torch.zeros(10)}, r"upstream_mask \(10,\)"),
        ({"accumulate_main_grad": True}, "student_weight.main_grad"),
        ({"target": STORED, "weighting": TokenWeighting("entropy")}, "whole"),
        ({"target": STORED, "weighting": TokenWeighting("label")}, "label_log_probs"),
        ({"target": STORED, "kind": "jsd"}, "bucket"),
        ({"target": STORED, "temperature": torch.ones(11)}, "at one temperature, 2.0"),
        ({"target": STORED, "temperature": 1.0}, "temperature: 1.0, but .* 2.0"),
        ({"target": STORED.changed(lambda slots: slots[:5])}, r"tokens \(11,\) of the student's"),
    ],
)
def test_misuse_of_targets_and_options_is_named(change, message):
    case = FusedCase.make()
    with pytest.raises(ValueError, match=message):
        case.call(*case.leaves(), **change)


def test_a_weighting_needs_a_target():
    case = FusedCase.make(weighting=TokenWeighting("label"), alpha=0.0)
    case.teacher_hidden = case.teacher_weight = None
    with pytest.raises(ValueError, match="a target must be given"):
        case.call(*case.leaves())


def test_tokens_in_two_dimensions_are_refused():
    case = FusedCase.make(t=12)
    student = Student(case.hidden.view(3, 4, -1), case.weight, case.labels.view(3, 4))
    target = Dense(case.teacher_hidden.view(3, 4, -1), case.teacher_weight)
    with pytest.raises(ValueError, match=r"must be \[t, h\] here"):
        fused_loss(student, target, TermWeights(1.0, 0.0))
