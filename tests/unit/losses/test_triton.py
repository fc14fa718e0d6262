"""The Triton kernels in Triton's interpreter on the CPU, against the torch operations of ``rows``.

Whether a kernel is interpreted is decided when Triton is imported, so these cases run in a process
of their own, with TRITON_INTERPRET set there only. Compiled kernels are tested in ``tests/gpu``.

Shapes: t tokens (rows), c columns of a rank. The launch shape of the cases makes tiles of 64
columns, so that small rows have whole tiles and a rest.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import get_context
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megatron_moe_inject import losses
from megatron_moe_inject.losses import (
    Sparse,
    TritonRows,
    triton_rows,
    vocab_parallel_divergence,
)
from megatron_moe_inject.losses import rows as row_maths
from megatron_moe_inject.losses.rows import LogitRows, RowStats, row_statistics
from megatron_moe_inject.losses.spec import (
    Divergence,
    LogitTransform,
    TokenWeighting,
    VocabShard,
)
from megatron_moe_inject.losses.triton_rows import kernels_for
from tests.harness.losses_cases import (
    KINDS,
    MIXTURE,
    REFERENCES,
    FusedCase,
    committee_case,
    logits,
    per_token,
    relative_error,
)
from tests.harness.losses_head_cases import CHANGES, ChangedHead

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

TILE, T = 64, 5
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A unit in the last place; the interpreter cuts bfloat16 off where GPUs round.
ROUNDING = {torch.float32: 5e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
DIVERGENCES = (None, *(Divergence(kind, 0.3, 0.2) for kind in KINDS))
_, FORWARD, REVERSE, JSD, SKEW = DIVERGENCES


@pytest.fixture(scope="module")
def run():
    """Calls a function of this module where Triton interprets its kernels."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1", PYTHONWARNINGS="ignore"):
            pool.submit(torch.set_num_threads, 1).result(timeout=120)
        yield lambda case, *args, **kwargs: pool.submit(case, *args, **kwargs).result(timeout=60)


def _kernels() -> TritonRows:
    return TritonRows(warps=1, width=2)


def _same(actual, expected, what, dtype=torch.float32, floor=1e-6):
    """Elementwise, also where infinite or not a number."""
    torch.testing.assert_close(
        actual.float(), expected.float(), rtol=ROUNDING[dtype], atol=floor, equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )  # fmt: skip


def _block(c, dtype=torch.float32, scale=2.0, start=5, temperature=2.5, **options) -> LogitRows:
    """Rows of a shard that begins at id ``start``, and a wider memory with NaN behind them."""
    x, y = logits(1, T, c + 3, dtype=dtype, scale=scale)
    x[:, c:] = y[:, c:] = torch.nan
    labels = torch.tensor([start, start + c - 1, -100, start - 1, start + c])
    return LogitRows(x[:, :c], y[:, :c], labels, temperature, **options)


def _shard(c, start=5):
    return VocabShard(start, c, None, 1000)


def _plain_statistics(block, divergence, shard, weighting):
    scratch = row_maths.Scratch(block, [slice(0, T)])
    return row_maths.local_statistics(block, divergence, shard, weighting, scratch)


def _statistics_agree(block, divergence, weighting):
    shard = _shard(block.x.shape[1])
    expected = _plain_statistics(block, divergence, shard, weighting)
    actual = _kernels().local_statistics(block, divergence, shard, weighting)
    assert set(actual) == set(expected)
    for name, stat in expected.items():
        assert actual[name].dtype == torch.float32
        _same(actual[name], stat, f"{name} of {divergence}", floor=5e-6)


def _statistics(c, dtype, temperature):
    block, weighting = _block(c, dtype, temperature=temperature), TokenWeighting("label")
    _statistics_agree(block, None, None)
    _statistics_agree(replace(block, labels=None), FORWARD, None)
    _statistics_agree(block, FORWARD, weighting)
    _statistics_agree(block, REVERSE, None)
    _statistics_agree(block, JSD, weighting)


@pytest.mark.parametrize(
    ("c", "temperature"), [(0, 2.5), (1, 1.0), (TILE, 2.5), (2 * TILE + 9, 1.0)]
)
def test_statistics(run, c, temperature):
    run(_statistics, c, torch.float32, temperature)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_statistics_of_16_bits(run, dtype):
    run(_statistics, TILE + 9, dtype, 2.5)


def _edges(divergence, temperature):
    block, weighting = _block(3 * TILE + 5, temperature=temperature), TokenWeighting("entropy")
    block.y[0, 3:] = -torch.inf  # possible ids in the first tile only
    block.y[1, : 2 * TILE] = -torch.inf
    block.y[2, ::2] = -torch.inf
    block.x[3, TILE:] = block.y[3, TILE:] = -torch.inf
    block.x[4, 7], block.y[4, 9] = 1e4, 1e4
    _statistics_agree(block, divergence, weighting)


@pytest.mark.parametrize("divergence", [FORWARD, REVERSE, JSD])
def test_excluded_ids(run, divergence):
    run(_edges, divergence, 1.0)
    run(_edges, divergence, 0.5 + 7 * per_token(T))


def _rising():
    """A teacher excludes an id of weight e^-140: not even e^-70 twice must make that infinite."""
    x, y = torch.zeros(1, 3 * TILE), torch.zeros(1, 3 * TILE)
    x[:, :TILE], x[:, TILE : 2 * TILE], y[0, 0] = -140, -70, -torch.inf
    block, shard = LogitRows(x, y, None, 1.0), _shard(3 * TILE)
    stats = row_statistics(replace(block, kernels=_kernels()), REVERSE, shard)
    _same(stats.divergence, row_statistics(block, REVERSE, shard).divergence, "D")
    assert stats.divergence.isfinite().all()


def test_an_excluded_id_of_no_weight_is_not_infinite(run):
    run(_rising)


def _merged():
    widths = (TILE, TILE + 3, 0, 5)
    x, y = logits(3, T, sum(widths), dtype=torch.float32)
    y[:, TILE : TILE + 40] = -torch.inf
    labels = torch.tensor([0, 63, 64, 130, -1])
    for divergence in (FORWARD, REVERSE, SKEW):
        whole = LogitRows(x, y, labels, 2.0)
        unsharded = VocabShard(0, x.shape[1], None, x.shape[1])
        weighting = TokenWeighting("label")
        expected = row_statistics(whole, divergence, unsharded, weighting)
        parts, start = [], 0
        for width in widths:
            columns, shard = slice(start, start + width), VocabShard(start, width, None, 136)
            part = replace(whole, x=x[:, columns], y=y[:, columns])
            parts.append((part, shard, columns))
            start += width
        local = [_kernels().local_statistics(p, divergence, s, weighting) for p, s, _ in parts]
        ranks = {name: torch.stack([stats[name] for stats in local]) for name in local[0]}
        stats = row_maths.merge(ranks, whole, divergence)
        if divergence.mixture is not None:
            terms = sum(_kernels().mixture_terms(p, stats, divergence) for p, _, _ in parts)
            stats = stats._replace(divergence=terms[0], slope=terms[1])
        for name, stat, merged in zip(RowStats._fields, expected, stats, strict=True):
            assert (stat is None) == (merged is None)
            if stat is not None:
                _same(merged, stat, f"{name} of {divergence}", floor=5e-6)
        weights = torch.ones(T), torch.ones(T)
        gradient = torch.empty_like(x)
        row_maths.logit_gradient(whole, expected, divergence, unsharded, *weights, gradient)
        for part, shard, columns in parts:
            out = torch.full_like(part.x, torch.nan)
            _kernels().logit_gradient(part, stats, divergence, shard, *weights, out)
            _same(out, gradient[:, columns], f"gradient of {divergence}")


def test_ranks_merge_as_ever_even_one_without_columns(run):
    run(_merged)


def _gradients(dtype, transform, temperature):
    c, shard = TILE + 9, _shard(TILE + 9)
    some, ones = per_token(T).float(), torch.ones(T)
    for divergence in DIVERGENCES:
        kd_ce = [(None, ones), (None, None)]
        if divergence is not None:
            kd_ce = [(some, some.flip(0)), (ones, None)]
        for kd, ce in kd_ce:
            block = _block(c, dtype, temperature=temperature, transform=transform)
            block.y[0] = torch.nan  # of no weight in ``some``
            block.y[1, : TILE + 2] = -torch.inf
            if divergence is not None and divergence.kind == "reverse_kl":
                block.x[1, : TILE + 2] = -torch.inf
            stats = row_statistics(block, divergence, shard)
            # As bfloat16 a squared logit of the transform is good to 2 digits in ``rows``.
            exact = replace(block, x=block.x.float(), y=block.y.float())
            expected = torch.empty_like(exact.x)
            row_maths.logit_gradient(exact, stats, divergence, shard, kd, ce, expected)
            where = block.x.untyped_storage()
            memory = torch.empty(0, dtype=dtype).set_(where, 0, (T, c + 3))
            row_maths.logit_gradient(
                replace(block, kernels=_kernels()), stats, divergence, shard, kd, ce, block.x
            )
            _same(block.x, expected, f"{divergence} {kd} {ce}", dtype, floor=1e-6)
            assert memory[:, c:].isnan().all(), "wrote behind the columns"


@pytest.mark.parametrize("transform", [None, LogitTransform(0.5), LogitTransform(2.0, 9.0)])
def test_gradient_in_place(run, transform):
    run(_gradients, torch.float32, transform, 2.5)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_gradient_in_16_bits(run, dtype):
    run(_gradients, dtype, LogitTransform(softcap=9.0), 1.0)


def test_gradient_at_a_temperature_per_token(run):
    run(_gradients, torch.float32, None, 0.5 + 7 * per_token(T))


def _equal_sides():
    for dtype, temperature in zip(DTYPES, (1.7, 1.0, 1.7), strict=True):
        x, _ = logits(4, 3, TILE + 9, dtype=dtype, scale=20.0)
        for kind in KINDS:
            student = x.clone().requires_grad_()
            loss = vocab_parallel_divergence(
                student, x, kind=kind, temperature=temperature, kernels=_kernels(), **MIXTURE
            )
            loss.sum().backward()
            assert (loss == 0).all(), f"{kind}, {dtype}: {loss}"
            assert (student.grad == 0).all(), f"{kind}, {dtype}: {student.grad.abs().max()}"


def test_exactly_zero_where_both_sides_are_equal(run):
    run(_equal_sides)


def _divergence(kind):
    for scale, temperature, v, valid in (
        (2.0, 2.0, 150, None),
        (1e4, 0.5, 90, 77),
        (0.0, 1.0, 1, 1),
    ):
        x, y = (side.float() for side in logits(6, 2, 2, v, scale=scale))
        upstream = torch.linspace(-1, 2, 4).view(2, 2)
        exact = x.double().requires_grad_()
        expected = REFERENCES[kind](
            exact, y.double(), temperature=temperature, valid_vocab_size=valid
        )
        expected.backward(upstream.double())
        # Columns that are not neighbours, as in a transposed matrix.
        student = x.movedim(-1, 0).contiguous().movedim(0, -1).requires_grad_()
        loss = vocab_parallel_divergence(
            student, y, kind=kind, temperature=temperature, valid_vocab_size=valid,
            kernels=_kernels(), **MIXTURE,
        )  # fmt: skip
        loss.backward(upstream)
        floor = 2e-6 * max(1.0, expected.abs().max().item())
        _same(loss, expected, "loss", floor=floor)
        _same(student.grad, exact.grad, "gradient", floor=floor)


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_is_the_reference(run, kind):
    run(_divergence, kind)


def _fused(options, head_trains, chunk, stored):
    case = FusedCase.make(t=4, v=80, valid=77, dtype=torch.float32, **options)
    if stored:
        generator = torch.Generator().manual_seed(0)
        ids = torch.rand(4, 77, generator=generator).argsort(-1)[:, :4]
        log_probs = torch.rand(4, 4, generator=generator).sub(3)
        case.teacher_hidden = case.teacher_weight = None
        temperature = options.get("temperature", 2.0)
        case.options["target"] = Sparse(ids, log_probs, "bucket", temperature)
    results = []
    for kernels in (None, _kernels()):
        hidden, weight = case.leaves(head_trains)
        loss = case.call(hidden, weight, chunk_tokens=chunk, kernels=kernels)
        loss.total.backward(case.upstream)
        results.append([*loss, hidden.grad, weight.grad])
    for name, expected, actual in zip(
        ("total", "kd", "ce", "factor", "hidden gradient", "head gradient"), *results, strict=True
    ):
        if expected is not None:
            _same(actual, expected, f"{options}: {name}", floor=2e-5)


def _changed_head(change, head):
    """The kernels read what a product of some columns wrote over the logits."""
    case = FusedCase.make(t=4, v=80, valid=77, dtype=torch.float32, kind="jsd")
    results = []
    for kernels in (None, _kernels()):
        own = ChangedHead.make(case, change, ids=range(0, 80, 3)).shard(0, 1, 80)
        hidden, weight = case.leaves(head_trains=False)
        options = {"chunk_tokens": 3, "kernels": kernels, **own.options, **case.promise(head)}
        loss = case.call(hidden, weight, **options)
        loss.total.backward(case.upstream)
        results.append([*loss, hidden.grad, *(leaf.grad for leaf in own.leaves.values())])
    for place, (expected, actual) in enumerate(zip(*results, strict=True)):
        _same(actual, expected, f"{change}, {head}: {place}", floor=2e-5)


@pytest.mark.parametrize("head", ["kept", "promised"])
def test_a_head_with_rows_of_its_own(run, head):
    for change in CHANGES:
        run(_changed_head, change, head)


def _mixture(kind):
    case = committee_case(kind=kind, dtype=torch.float32, weighting=TokenWeighting("entropy"))
    results = []
    for kernels in (None, _kernels()):
        hidden, weight = case.leaves()
        loss = case.call(hidden, weight, kernels=kernels)
        loss.total.backward(case.upstream)
        results.append([*loss, hidden.grad, weight.grad])
    for expected, actual in zip(*results, strict=True):
        _same(actual, expected, kind, floor=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_committee_of_teachers(run, kind):
    run(_mixture, kind)


FUSED = [
    {"temperature": 2.0},
    {"temperature": 1.0, "kind": "reverse_kl", "alpha": per_token(4), "beta": 0.0},
    {"temperature": 1 + per_token(4), "kind": "jsd", "student_transform": LogitTransform(2.0, 9.0)},
    {"kind": "skew_kl", "weighting": TokenWeighting("entropy", skip_worse=True)},
    {"temperature": 1.0, "weighting": TokenWeighting("label")},
    {"alpha": 0.0},
]


@pytest.mark.parametrize("options", FUSED)
def test_fused(run, options):
    run(_fused, options, False, 4, stored=False)
    run(_fused, options, True, 3, stored=False)


def _measured(teacher):
    case = FusedCase.make(t=5, v=80, valid=77, dtype=torch.float32)
    case.labels[1] = -1
    student, target = case.student(case.hidden, case.weight), case.target() if teacher else None
    plain, ours = (
        losses.measure_tokens(student, target, chunk_tokens=3, kernels=kernels)
        for kernels in (None, _kernels())
    )
    for name, expected in plain._asdict().items():
        found = getattr(ours, name)
        if expected is None:
            assert found is None, name
        elif name.endswith("top"):
            assert torch.equal(found, expected), name
        else:
            _same(found, expected, name)


@pytest.mark.parametrize("teacher", [True, False])
def test_measures(run, teacher):
    run(_measured, teacher)


@pytest.mark.parametrize("head_trains", [False, True])
def test_fused_with_a_stored_teacher(run, head_trains):
    run(_fused, {"kind": "reverse_kl"}, head_trains, 3, stored=True)


def _nearly_equal():
    """JSD is of second order: rounded logarithms of P/M and Q/M, both nearly 1, would swamp it."""
    x, y = logits(8, 3, TILE + 9, dtype=torch.float32, scale=1.0)
    y = x + 1e-3 * y
    expected = REFERENCES["jsd"](x.double(), y.double())
    loss = vocab_parallel_divergence(x, y, kind="jsd", kernels=_kernels(), **MIXTURE)
    assert expected.max() < 1e-6
    assert relative_error(loss, expected) < 2e-3


def test_jsd_of_nearly_equal_sides(run):
    run(_nearly_equal)


def _wrong_dtype():
    x, y = logits(0, 2, 8)
    with pytest.raises(ValueError, match=r"torch.float64 on cpu; leave kernels=None"):
        vocab_parallel_divergence(x, y, kind="forward_kl", kernels=_kernels())


def test_float64_is_refused(run):
    run(_wrong_dtype)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets")
def test_a_cpu_tensor_is_refused():
    x, y = logits(0, 2, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"CUDA tensors .* torch.float32 on cpu"):
        vocab_parallel_divergence(x, y, kind="forward_kl", kernels=TritonRows())


def _like(dtype, is_cuda=True):
    """What the choice of kernels looks at."""
    return SimpleNamespace(is_cuda=is_cuda, dtype=dtype)


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is not built for CUDA")
def test_kernels_are_the_default_on_a_gpu(monkeypatch):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert kernels_for("auto", _like(dtype)) == TritonRows()
        assert kernels_for("auto", _like(dtype, is_cuda=False)) is None
        assert kernels_for(None, _like(dtype)) is None
        assert kernels_for(TritonRows(2, 4), _like(dtype, is_cuda=False)) == TritonRows(2, 4)
    assert kernels_for("auto", _like(torch.float64)) is None
    bf16 = _like(torch.bfloat16)
    assert kernels_for("auto", bf16, None) == kernels_for("auto", bf16, bf16) == TritonRows()
    assert kernels_for("auto", bf16, _like(torch.float64)) is None, "the teacher's count too"
    monkeypatch.setattr(torch.version, "cuda", None)  # a build for AMD has is_cuda too
    assert kernels_for("auto", _like(torch.bfloat16)) is None
    with pytest.raises(ValueError, match="kernels='fast' is neither 'auto', None nor an object"):
        kernels_for("fast", _like(torch.bfloat16))


def test_without_triton_the_default_is_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "megatron_moe_inject.losses.triton_kernels", raising=False)
    monkeypatch.delattr(losses, "triton_kernels", raising=False)
    triton_rows._triton_rows.cache_clear()
    assert kernels_for("auto", _like(torch.bfloat16)) is None
    triton_rows._triton_rows.cache_clear()


def test_triton_is_imported_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "megatron_moe_inject.losses.triton_kernels", raising=False)
    monkeypatch.delattr(losses, "triton_kernels", raising=False)
    x, y = logits(0, 2, 8, dtype=torch.float32)
    assert vocab_parallel_divergence(x, y, kind="jsd").isfinite().all()
    with pytest.raises(ValueError, match=r"needs the package triton.*kernels=None"):
        TritonRows()
