"""The losses on a CUDA device, plain and as Triton kernels, against fp64 references on the CPU.

Shapes: t tokens, h hidden, v vocabulary. Not sharded: one GPU. Rows are longer than a tile of the
kernels and end within one.
"""

import functools
from dataclasses import replace

import pytest
import torch

from megatron_moe_inject.losses import (
    Dense,
    FusedOptions,
    Sparse,
    Student,
    TermWeights,
    TritonRows,
    Vocabulary,
    fused_loss,
    measure_tokens,
    reference,
    vocab_parallel_divergence,
    vocab_parallel_sparse_divergence,
)
from megatron_moe_inject.losses.rows import LogitRows, logit_gradient, row_statistics
from megatron_moe_inject.losses.spec import (
    Divergence,
    LogitTransform,
    TokenWeighting,
    VocabShard,
)
from tests.harness.gpu_losses import (
    VALID,
    T,
    V,
    assert_waits_for_nothing,
    case_of,
    kernels,
    on_gpu,
    whole_float32,
)
from tests.harness.losses_cases import (
    HEADS,
    KINDS,
    MIXTURE,
    REFERENCES,
    FusedCase,
    assert_close,
    logits,
    per_token,
    relative_error,
)
from tests.harness.losses_sparse_cases import TAIL_KINDS, stored_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

__all__ = ["kernels", "whole_float32"]
"""Fixtures."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _matches(case: FusedCase, kernels, head: str, tolerance: float, **options):
    expected = case.dense()
    there = on_gpu(case)
    hidden, weight = there.leaves(head != "frozen")
    loss = there.call(hidden, weight, kernels=kernels, **there.promise(head), **options)
    loss.total.backward(there.upstream)
    for name in ("total", "kd", "ce", "kd_factor"):
        assert_close(getattr(loss, name).cpu(), expected[name], name, tolerance)
    assert_close(hidden.grad.cpu(), expected["hidden"], "hidden gradient", tolerance)
    if head != "frozen":
        assert_close(weight.grad.cpu(), expected["weight"], "head gradient", tolerance)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_fused(kernels, kind, head):
    case = case_of(kind=kind, dtype=torch.float32, alpha=per_token(T), beta=per_token(T, seed=6))
    _matches(case, kernels, head, 1e-5, chunk_tokens=8)


OPTIONS = [
    {"temperature": 1.0},
    {"temperature": 0.5 + 7 * per_token(T), "kind": "reverse_kl"},
    {"student_transform": LogitTransform(2.0, 5.0), "teacher_transform": LogitTransform(0.5, 4.0)},
    {"student_transform": LogitTransform(0.25), "kind": "jsd"},
    {"weighting": TokenWeighting("label", skip_worse=True)},
    {"weighting": TokenWeighting("entropy"), "temperature": 1.0, "kind": "skew_kl"},
    {"alpha": 0.0},
    {"beta": 0.0},
]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("options", OPTIONS)
def test_fused_options(kernels, options, head):
    _matches(case_of(dtype=torch.float32, **options), kernels, head, 1e-5, chunk_tokens=16)


@pytest.mark.parametrize("teacher", [True, False])
def test_measures(kernels, teacher):
    case = case_of(dtype=torch.float32)
    if not teacher:
        case.teacher_hidden = case.teacher_weight = None
    expected = measure_tokens(case.student(case.hidden, case.weight), case.target())
    there = on_gpu(case)
    student = there.student(there.hidden, there.weight)
    found = measure_tokens(student, there.target(), chunk_tokens=8, kernels=kernels)
    for name, value in expected._asdict().items():
        ours = getattr(found, name)
        if value is None:
            assert ours is None, name
        elif name.endswith("top"):
            assert torch.equal(ours.cpu(), value), name
        else:
            assert_close(ours.cpu(), value, name, 1e-5)


def _device_time(step) -> float:
    """Microseconds that kernels took, the least of three times."""
    found = []
    for _ in range(4):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            step()
            torch.cuda.synchronize()
        events = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        found.append(sum(event.time_range.elapsed_us() for event in events))
    return min(found[1:])


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_an_odd_number_of_ids_costs_little(kernels, dtype, head_trains):
    """cuBLAS has kernels for operands of any alignment, several times slower than the others."""
    t, h, v = 2048, 2048, 32768
    hidden, teacher = (torch.randn(t, h, device="cuda", dtype=dtype) for _ in range(2))
    weight, head = (torch.randn(v, h, device="cuda", dtype=dtype) / 32 for _ in range(2))
    hidden.requires_grad_()
    weight.requires_grad_(head_trains)
    labels = torch.arange(t, device="cuda")

    def step(valid):
        options = FusedOptions(kernels=kernels, upstream_mask=torch.ones(t, device="cuda"))
        student = Student(hidden, weight, labels, Vocabulary(valid_size=valid))
        loss = fused_loss(student, Dense(teacher, head), TermWeights(0.5, 0.5), options)
        loss.total.mean().backward()

    times = {valid: _device_time(functools.partial(step, valid)) for valid in (v, v - 1)}
    assert 0 < times[v - 1] < 1.25 * times[v], times


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_16_bits_are_no_worse_than_naive(kernels, kind, dtype, head):
    case = case_of(kind=kind, dtype=dtype, t=96, alpha=per_token(96), beta=per_token(96, seed=6))
    expected, there = case.dense(), on_gpu(case)

    naive_hidden, naive_weight = there.leaves()
    x = (naive_hidden @ naive_weight.t()).float()
    y = (there.teacher_hidden @ there.teacher_weight.t()).float()
    kd = REFERENCES[kind](x, y, temperature=2.0, valid_vocab_size=VALID)
    ce = reference.cross_entropy(x, there.labels, valid_vocab_size=VALID)
    alpha, beta = (there.options[name].float() for name in ("alpha", "beta"))
    naive = alpha * kd + beta * ce
    naive.backward(there.upstream)

    hidden, weight = there.leaves(head != "frozen")
    loss = there.call(hidden, weight, chunk_tokens=40, kernels=kernels, **there.promise(head))
    loss.total.backward(there.upstream)
    pairs = {"total": (loss.total, naive), "hidden": (hidden.grad, naive_hidden.grad)}
    if head != "frozen":
        pairs["weight"] = (weight.grad, naive_weight.grad)
    for name, (ours, theirs) in pairs.items():
        error, budget = (relative_error(x.cpu(), expected[name]) for x in (ours, theirs))
        # In float16 some of 5,000 probabilities are subnormal; naive scales before it rounds.
        allowed = (1.5 if dtype == torch.float16 else 1.2) * budget
        assert error <= allowed, f"{name}: error {error:.3g}, naive path {budget:.3g}"


def _value_and_gradient(x, y, **options):
    student = x.cuda().requires_grad_()
    loss = vocab_parallel_divergence(student, y.cuda(), **MIXTURE | options)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach().cpu(), gradient.cpu()


@pytest.mark.parametrize(("scale", "temperature"), [(2.0, 1.0), (2.0, 3.0), (1e4, 0.5), (0.0, 1.0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_divergence(kernels, kind, dtype, scale, temperature):
    x, y = logits(1, 3, 20_017, dtype=dtype, scale=scale)
    for top in (None, 20_001):  # of all columns, and of rows that are longer than what counts
        exact = x.double().requires_grad_()
        expected = REFERENCES[kind](
            exact, y.double(), temperature=temperature, valid_vocab_size=top
        )
        expected.sum().backward()
        loss, gradient = _value_and_gradient(
            x, y, kind=kind, temperature=temperature, valid_vocab_size=top, kernels=kernels
        )
        assert_close(loss, expected, "loss", 3e-6)
        # Written in the student's dtype; at 1e4 the losses, of that size, round their own gradient.
        budget = {torch.float32: 3e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
        error = (gradient.double() - exact.grad).abs()
        limit = budget * exact.grad.abs() + 3e-7 * max(1.0, expected.abs().max().item())
        assert (error <= limit).all(), f"gradient: off by {error.max():.3g}"
        assert top is None or (gradient[:, top:] == 0).all()


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "skew_kl"])
def test_teacher_excludes_ids(kernels, kind):
    x, y = logits(2, 3, V, dtype=torch.float32)
    y[0, 1:] = -torch.inf
    y[1, : V // 2] = -torch.inf
    y[2, ::2] = -torch.inf
    exact = x.double().requires_grad_()
    expected = REFERENCES[kind](exact, y.double(), temperature=2.0)
    expected.sum().backward()
    loss, gradient = _value_and_gradient(x, y, kind=kind, temperature=2.0, kernels=kernels)
    assert_close(loss, expected, "loss", 3e-6)
    assert_close(gradient, exact.grad, "gradient", 3e-6)


def test_reverse_kl_is_infinite_where_the_teacher_excludes_a_possible_id(kernels):
    x, y = logits(3, 3, V, dtype=torch.float32)
    y[0, 7] = x[1, 7] = y[1, 7] = -torch.inf
    loss, gradient = _value_and_gradient(x, y, kind="reverse_kl", kernels=kernels)
    assert loss[0] == torch.inf
    assert loss[1:].isfinite().all()
    assert gradient[1:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 1.7, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_zero_where_both_sides_are_equal(kernels, kind, temperature, dtype):
    x, _ = logits(4, 5, V, dtype=dtype, scale=20.0)
    loss, gradient = _value_and_gradient(x, x, kind=kind, temperature=temperature, kernels=kernels)
    assert (loss == 0).all(), loss
    assert (gradient == 0).all(), gradient.abs().max()


@pytest.mark.parametrize(("tail", "kind"), TAIL_KINDS)
def test_sparse(tail, kind):
    x, y = logits(7, T, V, dtype=torch.float32)
    ids, log_probs = stored_for(tail, y, 16, 2.0, valid=VALID)
    options = {"kind": kind, "tail": tail, "temperature": 2.0, "valid_vocab_size": VALID, **MIXTURE}
    exact = x.double().requires_grad_()
    expected = reference.sparse_divergence(exact, ids, log_probs.double(), **options)
    expected.sum().backward()
    student = x.cuda().requires_grad_()
    loss = vocab_parallel_sparse_divergence(student, ids.cuda(), log_probs.cuda(), **options)
    loss.sum().backward()
    assert_close(loss.cpu(), expected, "loss", 1e-5)
    assert_close(student.grad.cpu(), exact.grad, "gradient", 1e-5)


def _stored(case: FusedCase, tail: str) -> Sparse:
    ids, log_probs = stored_for(tail, logits(9, len(case.hidden), V)[1], 16, 2.0, valid=VALID)
    return Sparse(ids, log_probs, tail, temperature=2.0)


def _moved(stored: Sparse) -> Sparse:
    """To the device, in float32."""
    ids, log_probs = stored.ids.cuda(), stored.log_probs.float().cuda()
    return replace(stored, ids=ids, log_probs=log_probs)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("tail", "kind"), TAIL_KINDS)
def test_fused_with_a_stored_teacher(kernels, tail, kind, head):
    case = case_of(kind=kind, dtype=torch.float32)
    stored = _stored(case, tail)
    hidden, weight = (leaf.detach().double().requires_grad_() for leaf in case.leaves())
    x = hidden @ weight.t()
    kd = reference.sparse_divergence(
        *(x, stored.ids, stored.log_probs),
        **{"kind": kind, "tail": tail, "temperature": 2.0, "valid_vocab_size": VALID, **MIXTURE},
    )
    total = 0.7 * kd + 0.3 * reference.cross_entropy(x, case.labels, valid_vocab_size=VALID)
    total.backward(case.upstream.double())

    there = on_gpu(case)
    there.teacher_hidden = there.teacher_weight = None
    teacher = _moved(stored)
    leaves = there.leaves(head != "frozen")
    options = {"chunk_tokens": 8, "kernels": kernels, "target": teacher}
    loss = there.call(*leaves, **options, **there.promise(head))
    loss.total.backward(there.upstream)
    assert_close(loss.total.cpu(), total, "total", 1e-5)
    assert_close(leaves[0].grad.cpu(), hidden.grad, "hidden gradient", 1e-5)
    if head != "frozen":
        assert_close(leaves[1].grad.cpu(), weight.grad, "head gradient", 1e-5)


def _rows(memory_dtype, t=T, **options) -> LogitRows:
    x, y = (side.cuda() for side in logits(5, t, V, dtype=memory_dtype))
    labels = torch.arange(t, device="cuda") * 239 % VALID
    labels[::4] = -100
    return LogitRows(x, y, labels, options.pop("temperature", 2.0), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 2.5, "per token"])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_the_plain_path(kind, temperature, dtype):
    pytest.importorskip("triton", reason="Triton is not installed")
    if temperature == "per token":
        temperature = (0.5 + 7 * per_token(T)).float().cuda()
    divergence, shard = Divergence(kind, 0.3, 0.2), VocabShard(0, VALID, None, VALID)
    weights = [per_token(T, seed).float().cuda() for seed in (1, 2)]
    results = []
    for way in (None, TritonRows(), TritonRows(warps=4, width=4)):
        block = _rows(dtype, temperature=temperature, kernels=way)
        block = replace(block, x=block.x[:, :VALID], y=block.y[:, :VALID])
        stats = row_statistics(block, divergence, shard, TokenWeighting("entropy"))
        logit_gradient(block, stats, divergence, shard, *weights, block.x)
        results.append((stats, block.x))
    for stats, gradient in results[1:]:
        for name, actual, expected in zip(stats._fields, stats, results[0][0], strict=True):
            assert (actual is None) == (expected is None)
            if expected is not None:
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=5e-6, msg=name)
        rounding = {torch.float32: 5e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
        torch.testing.assert_close(gradient, results[0][1], rtol=rounding, atol=1e-6)


def _step(case: FusedCase, leaves, **options):
    """Losses and gradients of one forward and backward pass, all on the device."""
    loss = case.call(*leaves, **options)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    return loss.total.detach(), *torch.autograd.grad(loss.total, trained, case.upstream)


STEPS = [
    {"kind": "forward_kl"},
    {"kind": "jsd", "weighting": TokenWeighting("label", skip_worse=True)},
    {"kind": "reverse_kl", "temperature": 0.5 + per_token(T)},
    {"kind": "forward_kl", "tail": "renormalize"},
    {"kind": "skew_kl", "tail": "bucket"},
]


def _gpu_step(options, head, kernels, dtype=torch.bfloat16):
    """A function that runs the step, and its leaves; everything is on the device already."""
    options = dict(options)
    tail = options.pop("tail", None)
    case = case_of(dtype=dtype, **options)
    if tail is not None:
        stored = _stored(case, tail)
        case.teacher_hidden = case.teacher_weight = None
    there = on_gpu(case)
    if tail is not None:
        there.options["target"] = _moved(stored)
    leaves = there.leaves(head != "frozen")
    options = {"chunk_tokens": 8, "kernels": kernels, **there.promise(head)}
    return (lambda: _step(there, leaves, **options)), leaves


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("options", STEPS)
def test_nothing_waits_for_the_device(kernels, options, head):
    step, _ = _gpu_step(options, head, kernels)
    assert_waits_for_nothing(step)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("options", STEPS)
def test_captured_in_a_cuda_graph(kernels, options, head):
    step, leaves = _gpu_step(options, head, kernels)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[0].mul_(-0.5)
    graph.replay()
    replayed = [result.clone() for result in captured]
    for result, expected in zip(replayed, step(), strict=True):
        assert_close(result.cpu(), expected.cpu(), "replayed", 1e-2)
        assert relative_error(result.cpu(), expected.cpu().double()) < 1e-2


def test_same_bits_every_time(kernels):
    step, _ = _gpu_step({"kind": "jsd"}, "trained", kernels)
    first = step()
    assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


def test_kernels_are_compiled_once_for_any_number_of_rows(monkeypatch):
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if not hasattr(triton, "knobs"):
        pytest.skip("this Triton has no hook for compilations")
    divergence, shard = Divergence("skew_kl"), VocabShard(0, V, None, V)

    def work(t):
        block = _rows(torch.bfloat16, t + 1, kernels=TritonRows()).rows(slice(1, None))
        stats = row_statistics(block, divergence, shard, TokenWeighting("label"))
        weight = torch.ones(t + 3, device="cuda")[3:]  # not aligned
        logit_gradient(block, stats, divergence, shard, weight, weight, torch.empty_like(block.x))

    work(16)
    compiled = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **call: compiled.append(call["repr"])
    )
    for t in (1, 7, 33, 1000):
        work(t)
    assert not compiled


def test_rows_beyond_31_bits(kernels):
    free, _ = torch.cuda.mem_get_info()
    if free < 8 << 30:
        pytest.skip("needs 8 GiB of free GPU memory")
    stride, c = 2**30, 4112  # both divisible by 16: the same compiled kernel for near and far
    memory = torch.zeros(2 * stride + c, dtype=torch.bfloat16, device="cuda")
    whole = memory.as_strided((3, c), (stride, 1))
    x, y = (side.cuda() for side in logits(11, 3, c, dtype=torch.bfloat16))
    whole.copy_(x)
    rows = LogitRows(whole, y, None, 1.0, kernels=kernels)
    near = replace(rows, x=x)
    divergence, shard = Divergence("reverse_kl"), VocabShard(0, c, None, c)
    expected = row_statistics(near, divergence, shard)
    stats = row_statistics(rows, divergence, shard)
    assert torch.equal(stats.divergence, expected.divergence)
    one = torch.ones(3, device="cuda")
    logit_gradient(near, expected, divergence, shard, one, None, x)
    logit_gradient(rows, stats, divergence, shard, one, None, whole)
    assert torch.equal(whole, x)
