"""Heads with rows of their own or a correction: work done, memory, precision and misuse.

Values and gradients at TP 1, 2 and 4 are in tests/parallel/test_losses_head_rows.py.
"""

import pytest
import torch
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_moe_inject.losses import HeadRows, LowRankHead, measure_tokens, reference
from tests.harness.losses_cases import (
    KINDS,
    REFERENCES,
    FusedCase,
    V,
    assert_close,
    per_token,
    relative_error,
)
from tests.harness.losses_head_cases import CHANGES, SCALE, ChangedHead

PROMISES = ("kept", "promised")
T, CHUNK, CHUNKS = 12, 4, 3
EVEN = 16
"""Real ids of float64 that fill multiples of 16 bytes."""


def _prepared(case, change="rows", head="kept", hidden_trains=True, **options):
    """What computes the loss, and the leaves that train by name."""
    own = ChangedHead.make(case, change, **options).shard(0, 1, len(case.weight))
    hidden, weight = case.leaves(head_trains=False)
    hidden.requires_grad_(hidden_trains)
    given = {"chunk_tokens": CHUNK, **own.options, **case.promise(head)}
    leaves = ({"hidden": hidden} if hidden_trains else {}) | own.leaves
    return (lambda: case.call(hidden, weight, **given)), leaves


def _call(*args, **options):
    """The loss, and the leaves that train by name."""
    compute, leaves = _prepared(*args, **options)
    return compute(), leaves


def _flops(case, change, head="kept", hidden_trains=True):
    """Multiplications of all matrix products of a forward and backward pass."""
    with profile(record_shapes=True) as trace:
        loss, _ = _call(case, change, head, hidden_trains)
        loss.total.backward(case.upstream)
    total, first = 0, {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}
    for event in trace.function_events:
        if event.name in first:
            left, right = event.input_shapes[first[event.name] :][:2]
            total += left[0] * left[1] * right[1]
    return total


def test_rows_cost_products_of_their_own_columns_alone():
    """3 of k columns beside the 3 of a frozen head; none of the head's size is formed again."""
    case, h, h_t = FusedCase.make(t=T, valid=EVEN), 6, 4
    frozen = T * EVEN * (2 * h + h_t)
    for head in PROMISES:
        assert _flops(case, None, head) == frozen
        assert _flops(case, "rows", head) == frozen + 3 * T * 8 * h
        without_hidden = T * EVEN * (h + h_t) + 2 * T * 8 * h
        assert _flops(case, "rows", head, hidden_trains=False) == without_hidden


def test_a_correction_costs_products_of_its_rank_where_the_mask_is_promised():
    case, h, h_t, r = FusedCase.make(t=T, valid=EVEN), 6, 4, 3
    frozen = T * EVEN * (2 * h + h_t)
    # a @ hidden twice, by a, by hidden through a; b's logits, by b's input, by b
    narrow, wide = 4 * T * r * h, 3 * T * r * EVEN
    assert _flops(case, "low rank", "promised") == frozen + narrow + wide


class _Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation made of its own."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, torch.Tensor)]
        known = {arg.untyped_storage().data_ptr() for arg in given}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in known:
                    elements = storage.nbytes() // tensor.itemsize
                    self.elements = max(self.elements, elements)
        return out


@pytest.mark.parametrize("head", PROMISES)
@pytest.mark.parametrize("change", CHANGES)
def test_nothing_of_the_size_of_the_head_or_of_all_logits_is_made(change, head):
    case = FusedCase.make(t=T, h=32, h_t=32, v=640, valid=640)
    compute, _ = _prepared(case, change, head, ids=range(0, 640, 20))
    with _Largest() as largest:
        compute().total.backward(case.upstream)
    spare = 0 if change == "low rank" else 2
    assert largest.elements == CHUNK * (640 + spare)
    assert largest.elements < min(case.weight.numel(), T * 640)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v", [1, 7, 8, 9, 40, 41])
def test_any_number_of_columns(v, dtype):
    """Rows of logits begin at multiples of 16 bytes, whatever follows their last column."""
    for head, change, valid in [(h, c, n) for h in PROMISES for c in CHANGES for n in (v, v - 1)]:
        if valid == 0:
            continue
        case = FusedCase.make(t=5, v=v, valid=valid, dtype=dtype)
        ids = range(0, v, 2)
        expected = ChangedHead.make(case, change, ids).applied(case).dense()
        loss, leaves = _call(case, change, head, ids=ids)
        loss.total.backward(case.upstream)
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
        assert_close(loss.total, expected["total"], "total", tolerance)
        assert_close(leaves["hidden"].grad, expected["hidden"], "hidden gradient", tolerance)


def _errors(kind, change, head, masked, seed):
    """Relative errors in bfloat16, by name: ours, and of the naive path."""
    case = FusedCase.make(
        seed=seed, t=96, h=64, h_t=32, v=512, valid=500, kind=kind, dtype=torch.bfloat16,
        alpha=per_token(96), beta=per_token(96, seed=6),
    )  # fmt: skip
    case.weight, case.teacher_weight = case.weight / 8, case.teacher_weight / 4
    if masked:
        case.upstream = torch.where(case.upstream > -0.5, -0.3, 0.0)
    ids = range(0, 512, 3)
    changed = ChangedHead.make(case, change, ids, scale=0.125)
    dense = changed.applied(case).dense()
    expected = {"total": dense["total"], "hidden": dense["hidden"]}
    expected |= changed.gradients(dense["weight"])

    naive_hidden, head_weight = case.leaves(head_trains=False)
    naive = changed.shard(0, 1, 512)
    weight = head_weight
    if naive.head_rows is not None:
        weight = weight.index_copy(0, changed.ids, naive.head_rows.values)
    x = naive_hidden @ weight.t()
    if naive.head_low_rank is not None:
        part = naive.head_low_rank
        x = x + SCALE * (naive_hidden @ part.a.t() @ part.b.t())
    y = (case.teacher_hidden @ case.teacher_weight.t()).float()
    kd = REFERENCES[kind](x.float(), y, temperature=2.0, valid_vocab_size=500)
    ce = reference.cross_entropy(x.float(), case.labels, valid_vocab_size=500)
    naive_total = case.options["alpha"].float() * kd + case.options["beta"].float() * ce
    naive_total.backward(case.upstream)

    own = changed.shard(0, 1, 512)
    hidden, weight = case.leaves(head_trains=False)
    loss = case.call(hidden, weight, chunk_tokens=32, **own.options, **case.promise(head))
    loss.total.backward(case.upstream)
    pairs = {"total": (loss.total, naive_total), "hidden": (hidden.grad, naive_hidden.grad)}
    for name, leaf in own.leaves.items():
        assert leaf.grad.dtype == torch.bfloat16
        pairs[name] = (leaf.grad, naive.leaves[name].grad)
    return {
        name: tuple(relative_error(found, expected[name]) for found in both)
        for name, both in pairs.items()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", PROMISES)
@pytest.mark.parametrize("change", CHANGES)
def test_bfloat16_is_no_worse_than_naive(kind, head, change):
    """The ratio of errors swings with the numbers: the mean of several.

    Where a scale of each token comes from above later, it is rounded into the hidden states: one
    rounding more than naive's for what is summed over tokens.
    """
    for masked in (False, True):
        found = [_errors(kind, change, head, masked, seed) for seed in range(12)]
        for name in found[0]:
            once = name in ("total", "hidden") or (masked and head == "promised")
            ratios = [errors[name][0] / errors[name][1] for errors in found]
            limit = 1.05 if once else 1.25
            assert sum(ratios) / len(ratios) <= limit, (name, masked, ratios)


@pytest.mark.parametrize("change", CHANGES)
def test_second_backward_pass_through_a_retained_graph(change):
    case = FusedCase.make(t=T)
    loss, leaves = _call(case, change)
    given = (loss.total, list(leaves.values()), case.upstream)
    first = torch.autograd.grad(*given, retain_graph=True)
    second = torch.autograd.grad(*given)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("change", CHANGES)
def test_a_broken_promise_is_not_a_number_but_for_the_hidden_states(change):
    case = FusedCase.make(t=T)
    expected = ChangedHead.make(case, change).applied(case).dense()["hidden"]
    own = ChangedHead.make(case, change).shard(0, 1, V)
    hidden, weight = case.leaves(head_trains=False)
    loss = case.call(hidden, weight, **own.options, upstream_mask=torch.ones(T))
    loss.total.backward(case.upstream)
    assert_close(hidden.grad, expected, "hidden gradient")
    for name, leaf in own.leaves.items():
        assert leaf.grad.isnan().all(), name


def test_values_that_are_the_heads_own_rows_change_nothing():
    case = FusedCase.make(t=T, dtype=torch.float32)
    ids = torch.arange(0, V, 2)
    rows = HeadRows(ids, case.weight[ids].clone())
    results = []
    for options in ({}, {"head_rows": rows}):
        hidden, weight = case.leaves(head_trains=False)
        loss = case.call(hidden, weight, chunk_tokens=CHUNK, **options)
        loss.total.backward(case.upstream)
        results.append((loss.total, hidden.grad))
    for ours, stock in zip(*results, strict=True):
        assert_close(ours, stock, "with rows", 1e-6)


def test_a_correction_of_zero_changes_no_bit_and_trains():
    """B = 0 is the original: the first step begins there."""
    case = FusedCase.make(t=T, dtype=torch.float32)
    changed = ChangedHead.make(case, "low rank")
    changed.b.zero_()
    own = changed.shard(0, 1, V)
    found = case.call(*case.leaves(head_trains=False), chunk_tokens=CHUNK, **own.options)
    stock = case.call(*case.leaves(head_trains=False), chunk_tokens=CHUNK)
    assert torch.equal(found.total, stock.total)
    found.total.backward(case.upstream)
    assert (own.leaves["a"].grad == 0).all()
    assert own.leaves["b"].grad.abs().max() > 0


ROWS = torch.tensor([1, 4])


@pytest.mark.parametrize(
    ("columns", "values", "message"),
    [
        (ROWS, torch.zeros(3, 6).double(), r"columns \(2,\) and values \(3, 6\)"),
        (ROWS[None], torch.zeros(2, 6).double(), r"columns \(1, 2\)"),
        (ROWS.int(), torch.zeros(2, 6).double(), "columns of a head's rows are torch.int32"),
        (ROWS, torch.zeros(2, 5).double(), r"values \(2, 5\) of rows of a head \(24, 6\)"),
        (ROWS, torch.zeros(2, 6), "values of a head's rows are torch.float32"),
        (torch.arange(25), torch.zeros(25, 6).double(), "at most 24 rows"),
    ],
)
def test_misuse_of_rows_is_named(columns, values, message):
    case = FusedCase.make()
    with pytest.raises(ValueError, match=message):
        case.call(*case.leaves(False), head_rows=HeadRows(columns, values))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((3, 6), (24, 2), r"a \(3, 6\) torch.float64 and b \(24, 2\) torch.float64"),
        ((3, 5), (24, 3), r"a \(3, 5\) and b \(24, 3\) of the correction"),
        ((3, 6), (12, 3), r"\[v/p, r\] of the head's \(24, 6\)"),
    ],
)
def test_misuse_of_a_correction_is_named(a, b, message):
    case = FusedCase.make()
    tensors = torch.zeros(a).double(), torch.zeros(b).double()
    with pytest.raises(ValueError, match=message):
        case.call(*case.leaves(False), head_low_rank=LowRankHead(*tensors, 1.0))


def test_a_head_that_trains_has_no_rows_of_its_own():
    case = FusedCase.make()
    rows = HeadRows(ROWS, torch.zeros(2, 6).double())
    with pytest.raises(ValueError, match="freeze it, or leave head_rows out"):
        case.call(*case.leaves(True), head_rows=rows)


@pytest.mark.parametrize("columns", [[3, V], [-1, 3]])
@pytest.mark.parametrize("valid", [17, V])
def test_a_row_that_a_rank_has_not_is_an_error(columns, valid):
    case = FusedCase.make(valid=valid)
    rows = HeadRows(torch.tensor(columns), torch.zeros(2, 6).double())
    with pytest.raises((IndexError, RuntimeError), match="index"):
        case.call(*case.leaves(False), head_rows=rows)
    student = case.student(case.hidden, case.weight, head_rows=rows)
    with pytest.raises((IndexError, RuntimeError), match="index"):
        measure_tokens(student)


def test_a_head_knows_what_trains():
    case = FusedCase.make()
    hidden, weight = case.leaves(head_trains=False)
    assert not case.student(hidden, weight).head_trains
    for change in CHANGES:
        for trains in (False, True):
            own = ChangedHead.make(case, change).shard(0, 1, V, trains)
            assert case.student(hidden, weight, **own.options).head_trains == trains
    assert case.student(*case.leaves(head_trains=True)).head_trains
