"""vocab_parallel_sparse_divergence on one process: properties, edges, precision and misuse."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_inject.losses import (
    Sparse,
    Student,
    Vocabulary,
    measure_tokens,
    reference,
    sample_teacher,
    target_confidence,
    vocab_parallel_sparse_divergence,
)
from megatron_moe_inject.losses import rows as row_maths
from megatron_moe_inject.losses.rows import LogitRows
from megatron_moe_inject.losses.sparse import SparseRows, sparse_gradient, sparse_statistics
from megatron_moe_inject.losses.spec import Divergence, LogitTransform, VocabShard
from tests.harness.losses_cases import (
    KINDS,
    MIXTURE,
    REFERENCES,
    VALID,
    V,
    assert_close,
    logits,
    relative_error,
)
from tests.harness.losses_sparse_cases import TAIL_KINDS, store, stored_for

cases = settings(max_examples=60, derandomize=True)
anything = {
    "seed": st.integers(0, 10**6),
    "scale": st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    "temperature": st.floats(0.5, 8.0),
    "tail_kind": st.sampled_from(TAIL_KINDS),
    "v": st.integers(1, 40),
    "k": st.integers(1, 8),
}


def _value_and_gradient(x, ids, log_probs, upstream=None, **options):
    student = x.clone().requires_grad_()
    loss = vocab_parallel_sparse_divergence(student, ids, log_probs, **MIXTURE | options)
    upstream = torch.ones_like(loss) if upstream is None else upstream
    return loss.detach(), torch.autograd.grad(loss, student, upstream)[0]


def _reference(x, ids, log_probs, upstream=None, **options):
    student = x.to(torch.float64, copy=True).requires_grad_()
    loss = reference.sparse_divergence(student, ids, log_probs.double(), **MIXTURE | options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.double()
    return loss.detach(), torch.autograd.grad(loss, student, upstream)[0]


@cases
@given(**anything)
def test_matches_the_reference(seed, scale, temperature, tail_kind, v, k):
    tail, kind = tail_kind
    x, y = logits(seed, 4, v, scale=scale)
    stored = stored_for(tail, y, min(k, v), temperature, seed=seed)
    upstream = torch.randn(4, generator=torch.Generator().manual_seed(seed)).double()
    options = {"kind": kind, "tail": tail, "temperature": temperature}
    expected = _reference(x, *stored, upstream, **options)
    loss, gradient = _value_and_gradient(x, *stored, upstream, **options)
    assert_close(loss, expected[0], "loss", 1e-9)
    assert_close(gradient, expected[1], "gradient", 1e-9)
    assert loss[0] == 0, "a token without a used slot has a loss"
    assert (gradient[0] == 0).all(), "a token without a used slot has a gradient"


@cases
@given(**anything)
def test_properties(seed, scale, temperature, tail_kind, v, k):
    tail, kind = tail_kind
    x, y = logits(seed, 4, v, scale=scale)
    ids, log_probs = stored_for(tail, y, min(k, v), temperature, seed=seed)
    options = {"kind": kind, "tail": tail, "temperature": temperature}
    loss, gradient = _value_and_gradient(x, ids, log_probs, **options)
    assert (loss >= 0).all(), "negative"
    assert_close(gradient.sum(-1), torch.zeros(4), "a shift of all logits changes the loss", 1e-9)
    order = torch.randperm(ids.shape[-1], generator=torch.Generator().manual_seed(seed))
    again, _ = _value_and_gradient(x + 3.0, ids[:, order], log_probs[:, order], **options)
    assert_close(again, loss, "the order of the slots or a shift of the logits matters", 1e-9)
    if kind == "jsd":
        bound = temperature**2 * math.log(1 / 0.3)
        assert (loss <= bound).all(), "above its bound"


@cases
@given(seed=st.integers(0, 10**6), temperature=st.floats(0.5, 8.0), kind=st.sampled_from(KINDS))
def test_a_store_of_everything_is_the_whole_divergence(seed, temperature, kind):
    x, y = logits(seed, 4, 12)
    stored = store(y, 12, temperature, seed=seed, unused=False)
    student = x.clone().requires_grad_()
    expected = REFERENCES[kind](student, y, temperature=temperature)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    for tail in ("bucket", "renormalize"):
        if tail == "bucket" or kind == "forward_kl":
            loss, gradient = _value_and_gradient(
                x, *stored, kind=kind, tail=tail, temperature=temperature
            )
            assert_close(loss, expected, f"{tail} loss")
            assert_close(gradient, expected_gradient, f"{tail} gradient")


@pytest.mark.parametrize("kind", KINDS)
def test_a_bucket_of_one_id_is_the_whole_divergence(kind):
    x, y = logits(1, 6, 9)
    stored = store(y, 8, 2.0, unused=False)
    student = x.clone().requires_grad_()
    expected = REFERENCES[kind](student, y, temperature=2.0)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    loss, gradient = _value_and_gradient(x, *stored, kind=kind, tail="bucket", temperature=2.0)
    assert_close(loss, expected, "loss")
    assert_close(gradient, expected_gradient, "gradient")


@pytest.mark.parametrize(("tail", "kind"), TAIL_KINDS)
def test_gradcheck(tail, kind):
    x, y = logits(0, 4, 9)
    stored = stored_for(tail, y, 3, 1.7, valid=7)

    def loss(student):
        return vocab_parallel_sparse_divergence(
            student, *stored, kind=kind, tail=tail, temperature=1.7, valid_vocab_size=7, **MIXTURE
        )

    assert torch.autograd.gradcheck(loss, x.requires_grad_())


@cases
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.5, 8.0),
    kind=st.sampled_from(KINDS),
    scale=st.sampled_from([0.0, 1.0, 20.0]),
    k=st.integers(1, 33),
)
def test_zero_in_a_bucket_where_both_sides_are_equal(seed, temperature, kind, scale, k):
    x, _ = logits(seed, 4, 33, dtype=torch.float32, scale=scale)
    stored = store(x, k, temperature, seed=seed, unused=False)
    loss, gradient = _value_and_gradient(
        x, *stored, kind=kind, tail="bucket", temperature=temperature
    )
    assert (loss.abs() <= 1e-7 * temperature**2).all(), loss
    assert (gradient.abs() <= 5e-7 * temperature).all(), gradient.abs().max()


@pytest.mark.parametrize(("tail", "kind"), TAIL_KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_naive(tail, kind, dtype):
    x, y = logits(1, 64, 500, dtype=dtype, scale=3.0)
    stored = stored_for(tail, y.float(), 16, 2.0)
    options = {"kind": kind, "tail": tail, "temperature": 2.0}
    expected = _reference(x, *stored, **options)

    naive = x.clone().requires_grad_()
    naive_loss = reference.sparse_divergence(naive.float(), *stored, **options | MIXTURE)
    naive_loss.sum().backward()

    loss, gradient = _value_and_gradient(x, *stored, **options)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    budget = relative_error(naive_loss, expected[0])
    assert relative_error(loss, expected[0]) <= 1.1 * budget + 1e-7
    budget = relative_error(naive.grad, expected[1])
    assert relative_error(gradient, expected[1]) <= 1.1 * budget + 1e-7


@pytest.mark.parametrize("second", [-1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_confident_teacher_keeps_its_bucket(kind, second):
    """1 - P and 1 - Q are below what float32 can tell from 0."""
    x = torch.tensor([[30.0, 1.0, 2.0, 3.0]])
    ids, log_probs = torch.tensor([[0, second]]), torch.tensor([[-1e-10, math.log(5e-11)]])
    log_probs = log_probs.double()
    expected = _reference(x, ids, log_probs, kind=kind, tail="bucket")
    loss, gradient = _value_and_gradient(x, ids, log_probs.float(), kind=kind, tail="bucket")
    if kind == "reverse_kl":  # counts as one rounding unit, so that it stays finite
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
        return
    assert_close(loss / expected[0], torch.ones(1), "loss", 1e-4)
    ratio = gradient[:, 1:] / expected[1][:, 1:]  # that of the id itself is a rounded difference
    assert_close(ratio, torch.ones(1, 3), "gradient", 1e-4)


def test_the_students_rest_does_not_cancel():
    """The teacher's bucket is large, the student's far below a rounding unit of 1."""
    x = torch.tensor([[90.0, 1.0, 2.0, 3.0]])
    ids, log_probs = torch.tensor([[0]]), torch.tensor([[0.25]]).log()
    for kind in KINDS:
        expected = _reference(x, ids, log_probs, kind=kind, tail="bucket")
        loss, gradient = _value_and_gradient(x, ids, log_probs, kind=kind, tail="bucket")
        assert_close(loss, expected[0], f"{kind} loss", 1e-6)
        assert_close(gradient, expected[1], f"{kind} gradient", 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_probabilities_above_one_are_scaled(kind):
    x, _ = logits(2, 1, 6)
    ids = torch.tensor([[4, 1, 2]])
    log_probs = torch.tensor([[0.5, 0.4, 0.2]], dtype=torch.float64).log()
    expected = _reference(x, ids, log_probs - math.log(1.1), kind=kind, tail="bucket")
    loss, gradient = _value_and_gradient(x, ids, log_probs, kind=kind, tail="bucket")
    assert loss.isfinite().all()
    assert_close(loss, expected[0], "loss", 1e-9)
    assert_close(gradient, expected[1], "gradient", 1e-9)


def test_reverse_kl_is_finite_where_the_store_leaves_nothing():
    x, _ = logits(3, 2, 6, dtype=torch.float32)
    ids, log_probs = torch.tensor([[4, -1], [4, 5]]), torch.tensor([[0.0, 0.0], [0.0, -200.0]])
    loss, gradient = _value_and_gradient(x, ids, log_probs, kind="reverse_kl", tail="bucket")
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    assert (gradient[0, [0, 1, 2, 3, 5]] > 0).all(), "the student's rest should shrink"


def test_padding_is_not_in_the_rest():
    x, y = logits(4, 5, V)
    x[:, VALID:] = torch.nan
    for tail, kind in TAIL_KINDS:
        stored = stored_for(tail, y, 4, valid=VALID)
        options = {"kind": kind, "tail": tail}
        expected = _value_and_gradient(x[:, :VALID], *stored, **options)
        loss, gradient = _value_and_gradient(x, *stored, valid_vocab_size=VALID, **options)
        assert torch.equal(loss, expected[0])
        assert torch.equal(gradient[:, :VALID], expected[1])
        assert (gradient[:, VALID:] == 0).all(), "padding got a gradient"


@pytest.mark.parametrize(("tail", "kind"), TAIL_KINDS)
def test_an_id_that_no_store_should_have_shows(tail, kind):
    x, y = logits(5, 5, V)
    ids, log_probs = stored_for(tail, y, 4, valid=VALID)
    options = {"kind": kind, "tail": tail, "valid_vocab_size": VALID}
    expected = _value_and_gradient(x, ids, log_probs, **options)
    ids[1, 1], ids[2, 2], ids[3, 3] = VALID, V + 100, VALID
    log_probs[1, 1] = log_probs[2, 2] = -40.0
    log_probs[3, 3] = -torch.inf  # unused: no harm
    expected = _value_and_gradient(x, ids.where(ids < VALID, -1), log_probs, **options)
    loss, gradient = _value_and_gradient(x, ids, log_probs, **options)
    assert (loss[1:3] == torch.inf).all()
    assert gradient[1:3, :VALID].isnan().all()
    assert torch.equal(loss[[0, 3, 4]], expected[0][[0, 3, 4]])
    assert torch.equal(gradient[[0, 3, 4]], expected[1][[0, 3, 4]])


def test_a_repeated_id_shows_unless_it_was_sampled():
    x, _ = logits(6, 3, V)
    ids = torch.tensor([[3, 5, 3], [3, 5, 4], [3, 5, 3]])
    log_probs = torch.full((3, 3), 0.2, dtype=torch.float64).log()
    log_probs[2, 2] = -torch.inf
    for tail, kind in TAIL_KINDS:
        loss, gradient = _value_and_gradient(x, ids, log_probs, kind=kind, tail=tail)
        assert loss[1:].isfinite().all()
        assert gradient[1:].isfinite().all()
        assert loss[0].isfinite() == (tail == "sample")
        assert gradient[0].isfinite().all() == (tail == "sample")


def _forward_kl_gradient(x, y, temperature):
    student = x.clone().requires_grad_()
    loss = reference.forward_kl(student, y, temperature=temperature)
    return torch.autograd.grad(loss.sum(), student)[0]


@pytest.mark.parametrize("proposal", ["teacher", "uniform"])
def test_sampling_is_exactly_unbiased(proposal):
    """The mean over every outcome of 3 draws from 4 ids, each with its probability."""
    x, y = logits(7, 1, 4)
    temperature, draws = 2.0, 3
    p = (y[0] / temperature).softmax(-1)
    r = p if proposal == "teacher" else torch.full_like(p, 1 / 4)
    ids = torch.tensor(list(product(range(4), repeat=draws)))
    log_weights = (p / (draws * r)).log()[ids]
    students = x.expand(len(ids), -1)
    loss, gradient = _value_and_gradient(
        students, ids, log_weights, tail="sample", temperature=temperature
    )
    chance = r[ids].prod(-1)
    entropy = -(p * p.log()).sum()
    expected = reference.forward_kl(x, y, temperature=temperature) + temperature**2 * entropy
    assert_close((chance * loss).sum()[None], expected, "mean loss")
    expected_gradient = _forward_kl_gradient(x, y, temperature)
    assert_close((chance[:, None] * gradient).sum(0)[None], expected_gradient, "mean gradient")


def test_sample_teacher_is_unbiased():
    x, y = logits(8, 1, 12)
    temperature, draws, repeats = 1.5, 4, 20_000
    log_probs = (y / temperature).log_softmax(-1).expand(repeats, -1)
    generator = torch.Generator().manual_seed(0)
    ids, log_weights = sample_teacher(log_probs, draws, generator)
    assert ids.shape == log_weights.shape == (repeats, draws)
    _, gradient = _value_and_gradient(
        x.expand(repeats, -1), ids, log_weights, tail="sample", temperature=temperature
    )
    expected = _forward_kl_gradient(x, y, temperature)[0]
    sigma = gradient.std(0) / repeats**0.5
    assert ((gradient.mean(0) - expected).abs() <= 5 * sigma).all()
    biased = _value_and_gradient(
        x, *store(y, 4, temperature, unused=False), tail="renormalize", temperature=temperature
    )[1][0]
    assert ((biased - expected).abs() > 5 * sigma).any(), "the test could not tell a bias"


def test_sample_teacher_repeats_itself_and_avoids_padding():
    log_probs = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).half()
    log_probs[..., 4:] = -torch.inf
    draws = [sample_teacher(log_probs, 30, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(draws[0][0], draws[1][0])
    assert draws[0][0].shape == (3, 5, 30)
    assert draws[0][0].max() == 3
    assert_close(draws[0][1].exp().sum(-1), torch.ones(3, 5), "weights", 1e-6)
    with pytest.raises(ValueError, match="draws=0"):
        sample_teacher(log_probs, 0)


def test_blocks_of_rows_change_nothing(monkeypatch):
    x, y = logits(9, 29, V, dtype=torch.float32)
    for tail, kind in TAIL_KINDS:
        stored = stored_for(tail, y, 5)
        whole = _value_and_gradient(x, *stored, kind=kind, tail=tail)
        monkeypatch.setitem(row_maths._BLOCK_ELEMENTS, "cpu", 4 * V)
        blocked = _value_and_gradient(x, *stored, kind=kind, tail=tail)
        monkeypatch.undo()
        assert torch.equal(whole[0], blocked[0])
        assert torch.equal(whole[1], blocked[1])


@pytest.mark.parametrize(("tail", "kind"), TAIL_KINDS)
def test_parts_on_a_chunk_with_a_temperature_per_token(tail, kind):
    """As a chunked loss uses them: rows of a target, weights with zeros, in place."""
    x, y = logits(10, 8, V)
    temperature = torch.linspace(0.5, 4.0, 8, dtype=torch.float64)
    ids, log_probs = stored_for(tail, y, 4, temperature[:, None])
    ids[6, 1] = V
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    whole = SparseRows.of(
        Sparse(ids, log_probs, tail), kind=kind, vocab_size=V, dtype=torch.float64
    )
    chunk = slice(2, 8)
    shard, divergence = VocabShard(0, V, None, V), Divergence(kind, **MIXTURE)
    part = LogitRows(x[chunk].clone(), None, None, temperature[chunk])
    target = whole.rows(chunk)
    stats = sparse_statistics(part, target, divergence, shard)
    sparse_gradient(part, target, stats, shard, weight[chunk], out=part.x)
    for row in range(2, 8):
        if weight[row] == 0:
            assert (part.x[row - 2] == 0).all()
            continue
        expected = _reference(
            x[row], ids[row], log_probs[row], kind=kind, tail=tail,
            temperature=temperature[row].item(),
        )  # fmt: skip
        loss = stats.divergence[row - 2] * temperature[row] ** 2
        assert_close(loss, expected[0], "loss")
        assert_close(part.x[row - 2], expected[1] * weight[row], "gradient")


@pytest.mark.parametrize(("tail", "kind"), TAIL_KINDS)
def test_the_gradient_goes_back_through_a_transform(tail, kind):
    raw, y = logits(16, 4, V)
    ids, log_probs = stored_for(tail, y, 4)
    transform = LogitTransform(scale=0.7, softcap=3.0)
    leaf = raw.clone().requires_grad_()
    capped = 3.0 * torch.tanh(0.7 * leaf / 3.0)
    options = {"kind": kind, "tail": tail}
    loss = reference.sparse_divergence(capped, ids, log_probs, **options, **MIXTURE)
    (expected,) = torch.autograd.grad(loss.sum(), leaf)
    target = SparseRows.of(
        Sparse(ids, log_probs, tail), kind=kind, vocab_size=V, dtype=torch.float64
    )
    shard, divergence = VocabShard(0, V, None, V), Divergence(kind, **MIXTURE)
    rows = LogitRows(transform.apply_(raw), None, None, 1.0, transform)
    stats = sparse_statistics(rows, target, divergence, shard)
    sparse_gradient(rows, target, stats, shard, torch.ones_like(loss).detach(), out=rows.x)
    assert_close(stats.divergence, loss, "loss")
    assert_close(rows.x, expected, "gradient")


def test_inputs_are_left_as_they_are_and_may_change_afterwards():
    x, y = logits(11, 4, V, dtype=torch.float32)
    for tail, kind in TAIL_KINDS:
        ids, log_probs = stored_for(tail, y, 4)
        before = x.clone(), ids.clone(), log_probs.clone()
        options = {"kind": kind, "tail": tail}
        _, expected = _value_and_gradient(x, ids, log_probs, **options)
        student = x.clone().requires_grad_()
        scores = student * 1.0
        loss = vocab_parallel_sparse_divergence(scores, ids, log_probs, **options | MIXTURE)
        for now, then in zip((scores.detach(), ids, log_probs), before, strict=True):
            assert torch.equal(now, then), "an input was modified"
        with torch.no_grad():
            scores.zero_()
            log_probs.zero_()
            ids.zero_()
        loss.sum().backward()
        assert torch.equal(student.grad, expected)


def test_any_layout():
    x, y = logits(12, 4, 5, V)
    ids, log_probs = store(y, 3)
    options = {"kind": "jsd", "tail": "bucket"}
    loss, gradient = _value_and_gradient(x, ids, log_probs, **options)
    strided = _value_and_gradient(
        *(part.transpose(0, 1) for part in (x, ids, log_probs)), **options
    )
    assert torch.equal(strided[0].t(), loss)
    assert torch.equal(strided[1].transpose(0, 1), gradient)
    row, row_gradient = _value_and_gradient(x[1, 0], ids[1, 0], log_probs[1, 0], **options)
    assert row.shape == ()
    assert torch.equal(row_gradient, gradient[1, 0])
    empty, empty_gradient = _value_and_gradient(x[:0], ids[:0], log_probs[:0], **options)
    assert empty.shape == (0, 5)
    assert empty_gradient.shape == (0, 5, V)


def test_no_gradient_work_without_need():
    x, y = logits(13, 4, V)
    ids, log_probs = store(y, 3)
    assert not vocab_parallel_sparse_divergence(x, ids, log_probs).requires_grad
    x.requires_grad_()
    with torch.no_grad():
        assert not vocab_parallel_sparse_divergence(x, ids, log_probs).requires_grad
    log_probs.requires_grad_()
    vocab_parallel_sparse_divergence(x, ids, log_probs).sum().backward()
    assert log_probs.grad is None, "the teacher is a constant"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "kl"}, "kind='kl'"),
        ({"tail": "ghost"}, "tail='ghost' .* renormalize, bucket, sample"),
        ({"kind": "jsd"}, "kind='jsd' with tail='renormalize'.*use tail=\"bucket\""),
        ({"kind": "reverse_kl", "tail": "sample"}, "kind='reverse_kl' with tail='sample'.*bucket"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"kind": "jsd", "tail": "bucket", "beta": 1.0}, "beta=1.0"),
        ({"valid_vocab_size": V + 1}, f"valid_vocab_size={V + 1}"),
    ],
)
def test_misuse_is_named(wrong, message):
    x, y = logits(14, 4, V)
    with pytest.raises(ValueError, match=message):
        vocab_parallel_sparse_divergence(x, *store(y, 3), **wrong)


def test_shapes_must_agree():
    x, y = logits(15, 4, V)
    ids, log_probs = store(y, 3)
    with pytest.raises(ValueError, match=r"ids \(4, 3\) and log_probs \(4, 2\)"):
        vocab_parallel_sparse_divergence(x, ids, log_probs[:, 1:])
    with pytest.raises(ValueError, match="at least one slot"):
        vocab_parallel_sparse_divergence(x, ids[:, :0], log_probs[:, :0])
    for part in (slice(1, None), (slice(None), 0)):
        with pytest.raises(ValueError, match=r"the tokens \(4,\) of the student's \(4, 24\)"):
            vocab_parallel_sparse_divergence(x, ids[part], log_probs[part])
    with pytest.raises(ValueError, match=r"ids are torch\.int32"):
        vocab_parallel_sparse_divergence(x, ids.int(), log_probs)


def _likeliest(y, k, temperature=1.0):
    """The teacher's k most likely ids, the first token having none."""
    log_probs, ids = (y / temperature).log_softmax(-1).topk(k)
    ids[0, :] = -1
    return ids, log_probs


def test_what_stored_ids_tell_is_measured_and_the_rest_is_missing():
    x, y = logits(17, 5, V)
    student = Student(x, torch.eye(V, dtype=x.dtype), torch.arange(5), Vocabulary(None, VALID))
    alone = measure_tokens(student)
    ids, log_probs = _likeliest(y, 4)
    found = measure_tokens(student, Sparse(ids, log_probs, "bucket"))
    for name in ("loss", "top", "confidence"):
        assert torch.equal(getattr(found, name), getattr(alone, name)), name
    assert found.teacher_loss is None
    assert found.kl is None
    assert found.teacher_top.tolist() == [-1, *y.argmax(-1)[1:].tolist()]
    expected = y.softmax(-1).amax(-1).index_fill(0, torch.tensor([0]), 0)
    assert_close(found.teacher_confidence, expected, "confidence", 1e-6)
    tempered = measure_tokens(student, Sparse(*_likeliest(y, 4, 2.0), "bucket", 2.0))
    assert torch.equal(tempered.teacher_top, found.teacher_top)
    assert tempered.teacher_confidence is None
    drawn = measure_tokens(student, Sparse(ids, log_probs, "sample"))
    assert drawn.teacher_top is drawn.teacher_confidence is None


def test_how_sure_a_stored_teacher_is():
    _, y = logits(18, 5, V)
    ids, log_probs = _likeliest(y, 4)
    stored, unsharded = Sparse(ids, log_probs), Vocabulary()
    labels = torch.tensor([ids[1, 0], ids[1, 2], -1, y[3].argmin(), ids[4, 3]])
    p = y.softmax(-1)
    expected = torch.tensor([0.0, p[1, labels[1]], 0.0, 0.0, p[4, labels[4]]])
    found = target_confidence(stored, "label", labels, unsharded)
    assert_close(found, expected, "of the label", 1e-6)
    top = target_confidence(stored, "top", labels, unsharded)
    assert_close(top[1:], p.amax(-1)[1:], "of the most likely id", 1e-6)
    assert top[0] == 0
    drawn = Sparse(*sample_teacher(y.log_softmax(-1), 400), "sample")
    estimated = target_confidence(drawn, "label", labels.clamp(min=0), unsharded)
    own = p.gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
    assert (estimated - own).abs().max() < 0.2
    with pytest.raises(ValueError, match="drawn"):
        target_confidence(drawn, "top", labels, unsharded)
    with pytest.raises(ValueError, match=r"stored at temperature 2\.0"):
        target_confidence(Sparse(ids, log_probs, temperature=2.0), "top", labels, unsharded)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_store_has_a_temperature(temperature):
    with pytest.raises(ValueError, match="of stored log_probs must be positive and finite"):
        Sparse(torch.zeros(1, 1).long(), torch.zeros(1, 1), temperature=temperature)
