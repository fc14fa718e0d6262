"""Losses of chunks of text against dense autograd, whatever divides the tokens or the ids."""

import itertools

import pytest
import torch
import torch.distributed as dist

from megatron_moe_inject.losses import (
    KINDS,
    Aligned,
    Divergence,
    FusedOptions,
    Student,
    TermWeights,
    aligned_loss,
    reference,
)
from megatron_moe_inject.losses.spec import LogitTransform, TokenWeighting
from tests.harness import gloo
from tests.harness.losses_cases import MIXTURE, REFERENCES, FusedCase, assert_close, per_token
from tests.harness.losses_head_cases import CHANGES, ChangedHead

WORLD = 4
T = 12
# Tokens 1, 5 and 9 have no label, 10 belongs to no chunk; chunks need not be neighbours.
CHUNKS = ((0,), (2, 3, 4), (6, 8), (7,), (11,))
LOG_PROBS = (-1e-4, -4.0, -0.7, -30.0, -2.0)


def case_of(seed=0, scale=1.0, dtype=torch.float64) -> FusedCase:
    case = FusedCase.make(seed=seed, t=T, dtype=dtype)
    case.hidden *= scale
    return case


def target_of(rows=slice(None), cp_group=None) -> Aligned:
    chunk = torch.full((T,), -1)
    log_probs, labels = torch.full((T,), torch.nan, dtype=torch.float64), torch.ones(T)
    for number, (members, log_prob) in enumerate(zip(CHUNKS, LOG_PROBS, strict=True)):
        chunk[list(members)] = number + 1  # not all numbers need be there
        log_probs[list(members)] = log_prob
        labels[list(members)] = len(members)
    return Aligned(chunk[rows], log_probs[rows], labels[rows], len(CHUNKS) + 2, cp_group)


def dense(case, kind, temperature, alpha, beta, transform=None):
    """Losses and gradients of the plain reference."""
    hidden = case.hidden.to(torch.float64, copy=True).requires_grad_()
    weight = case.weight.to(torch.float64, copy=True).requires_grad_()
    valid = case.options["valid_vocab_size"]
    logits = reference.transformed(hidden @ weight.t(), transform)
    kd = reference.aligned(
        logits, case.labels, CHUNKS, LOG_PROBS, divergence=REFERENCES[kind],
        temperature=temperature, valid_vocab_size=valid,
    )  # fmt: skip
    ce = reference.cross_entropy(logits, case.labels, valid_vocab_size=valid)
    total = alpha * kd + beta * ce
    grads = torch.autograd.grad(total, (hidden, weight), case.upstream.double())
    named = {"total": total, "kd": kd, "ce": ce, "hidden": grads[0], "weight": grads[1]}
    return {name: value.detach() for name, value in named.items()}


def _matches(size, kind, head, temperature=1.0, tol=1e-9, scale=1.0, **options):
    group = gloo.block_group(size)
    case = case_of(scale=scale)
    alpha, beta = options.pop("alpha", 0.7), options.pop("beta", 0.3)
    expected = dense(case, kind, temperature, alpha, beta, options.get("transform"))
    part = case.shard(group.rank(), size)
    hidden, weight = part.leaves(head_trains=head == "trained")
    student = part.student(hidden, weight, group, options.get("transform"))
    weights = TermWeights(alpha, beta, Divergence(kind, **MIXTURE), temperature)
    loss = aligned_loss(student, target_of(), weights, FusedOptions(chunk_tokens=5))
    loss.total.backward(part.upstream)
    for name in ("total", "kd", "ce"):
        assert_close(getattr(loss, name), expected[name], name, tol)
    assert_close(hidden.grad, expected["hidden"], "hidden gradient", tol)
    if head == "trained":
        width = len(case.weight) // size
        rows = expected["weight"][group.rank() * width : (group.rank() + 1) * width]
        assert_close(weight.grad, rows, "head gradient", tol)
    else:
        assert weight.grad is None
    return [loss.total.detach(), hidden.grad]


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_value_and_gradient(size, head):
    for kind, temperature in itertools.product(KINDS, (1.0, 20.0)):
        ranks = gloo.pool(WORLD).run(_matches, size, kind, head, temperature)
        for found in ranks[1:size]:
            assert all(map(torch.equal, found, ranks[0])), "ranks disagree"


def test_weights_by_token_and_scaled_logits():
    options = dict(alpha=per_token(T), beta=per_token(T, seed=6), transform=LogitTransform(0.5))
    gloo.pool(WORLD).run(_matches, 2, "forward_kl", "frozen", **options)
    gloo.pool(WORLD).run(_matches, 2, "jsd", "trained", alpha=0.0, beta=1.0)


def _changed_heads(change):
    group = gloo.block_group(2)
    case = case_of()
    changed = ChangedHead.make(case, change)
    expected = dense(changed.applied(case), "forward_kl", 3.0, 0.7, 0.3)
    part = case.shard(group.rank(), 2)
    hidden, weight = part.leaves(head_trains=False)
    own = changed.shard(group.rank(), 2, len(case.weight))
    if own.head_low_rank is not None:
        padding = torch.arange(len(case.weight))[own.ids] >= case.options["valid_vocab_size"]
        own.head_low_rank.b.data[padding] = torch.nan
    student = part.student(hidden, weight, group, **own.options)
    weights = TermWeights(0.7, 0.3, temperature=3.0)
    loss = aligned_loss(student, target_of(), weights, FusedOptions(chunk_tokens=5))
    loss.total.backward(part.upstream)
    assert_close(loss.total, expected["total"], "total")
    assert_close(hidden.grad, expected["hidden"], "hidden gradient")
    for name, gradient in own.cut(changed.gradients(expected["weight"])).items():
        assert_close(own.leaves[name].grad, gradient, f"gradient of {name}")


@pytest.mark.parametrize("change", CHANGES)
def test_heads_that_change(change):
    gloo.pool(WORLD).run(_changed_heads, change)


def _divided(kind):
    """TP 2 and CP 2: half of the tokens on a rank, chunks over both, another upstream on each."""
    rank = dist.get_rank()
    group = gloo.block_group(2)
    across = [dist.new_group([place, place + 2]) for place in (0, 1)][rank % 2]
    case = case_of()
    expected = dense(case, kind, 2.0, 0.7, 0.3)
    part = case.shard(group.rank(), 2)
    rows = torch.arange(T).view(4, -1)[[rank // 2, 3 - rank // 2]].flatten()  # zig-zag
    part.hidden, part.labels = part.hidden[rows], part.labels[rows]
    hidden, weight = part.leaves()
    weights = TermWeights(0.7, 0.3, Divergence(kind, **MIXTURE), 2.0)
    student = part.student(hidden, weight, group)
    loss = aligned_loss(student, target_of(rows, across), weights, FusedOptions(chunk_tokens=5))
    loss.total.backward(part.upstream[rows])
    assert_close(loss.total, expected["total"][rows], "total")
    assert_close(hidden.grad, expected["hidden"][rows], "hidden gradient")
    dist.all_reduce(weight.grad, group=across)
    own = expected["weight"].view(2, -1, expected["weight"].shape[1])[group.rank()]
    assert_close(weight.grad, own, "head gradient")


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_over_ranks_that_divide_sequences(kind):
    gloo.pool(WORLD).run(_divided, kind)


def _counted():
    group = gloo.block_group(2)
    part = case_of().shard(group.rank(), 2)
    hidden, weight = part.leaves(head_trains=False)
    student = part.student(hidden, weight, group)
    with gloo.count_collectives() as counts:
        loss = aligned_loss(student, target_of(), TermWeights(1.0, 0.0), FusedOptions(5))
        forward = dict(counts)
        loss.total.sum().backward()
    return forward, dict(counts)


def test_collectives_are_those_of_a_cross_entropy():
    for forward, both in gloo.pool(WORLD).run(_counted):
        assert {k: v for k, v in forward.items() if v} == {"all_gather_into_tensor": 3}
        assert {k: v for k, v in both.items() if v} == {
            "all_gather_into_tensor": 3,
            "all_reduce": 1,
        }


@pytest.mark.parametrize("certain", ["student", "teacher", "both"])
def test_certain_of_the_text(certain):
    """Probabilities within 1e-14 of 1, in float32: value and gradient by closed form."""
    v, margin = 5, 32.0
    logits = torch.zeros(1, v)
    logits[0, 2] = margin + torch.tensor(v - 1.0).log() if certain != "teacher" else 0.3
    log_p = -1e-13 if certain != "student" else -0.5
    hidden = logits.clone().requires_grad_()
    weight = torch.eye(v)
    case_labels = torch.tensor([2])
    target = Aligned(torch.tensor([0]), torch.tensor([log_p]), torch.ones(1), 1)
    loss = aligned_loss(Student(hidden, weight, case_labels), target, TermWeights(1.0, 0.0))
    loss.total.sum().backward()
    wide = logits.double()
    others = wide[0, [0, 1, 3, 4]].logsumexp(0)
    m = wide[0, 2] - others
    q, q1 = m.sigmoid(), (-m).sigmoid()
    p = torch.tensor(torch.tensor(log_p).double().exp())
    p1 = -torch.tensor(log_p).double().expm1()
    value = p * (p.log() - q.log()) + p1 * (p1.log() - q1.log())
    gradient = p1 * q - p * q1  # q - p, without the difference of two numbers near 1
    assert loss.kd.item() == pytest.approx(value.item(), rel=1e-5, abs=1e-12)
    assert hidden.grad[0, 2].item() == pytest.approx(gradient.item(), rel=1e-5)
    softmax = (wide[0, [0, 1, 3, 4]] - others).exp()
    torch.testing.assert_close(
        hidden.grad[0, [0, 1, 3, 4]].double(), -gradient * softmax, rtol=1e-5, atol=0
    )


def test_chunks_are_weighed_by_what_the_teacher_is_sure_of():
    case = case_of()
    student = case.student(*case.leaves())
    for weighting, expected in (
        (TokenWeighting("label"), lambda p, q: p.exp()),
        (TokenWeighting("none", True), lambda p, q: (p >= q).double()),
        (TokenWeighting("label", True), lambda p, q: p.exp() * (p >= q)),
    ):
        loss = aligned_loss(student, target_of(), TermWeights(1.0, 0.0, weighting=weighting))
        plain = aligned_loss(student, target_of(), TermWeights(1.0, 0.0))
        assert torch.equal(loss.kd, plain.kd)
        for members, log_p in zip(CHUNKS, LOG_PROBS, strict=True):
            log_q = -plain.ce[list(members)].sum()
            want = expected(torch.tensor(log_p, dtype=torch.float64), log_q.double())
            for place in members:
                assert loss.kd_factor[place].item() == pytest.approx(want.item(), rel=1e-6)
        assert torch.equal(loss.kd_factor[[1, 5, 9, 10]], torch.zeros(4, dtype=torch.float64))
        assert_close(loss.total, loss.kd_factor * loss.kd, "total")
    weights = TermWeights(1.0, 0.0, weighting=TokenWeighting("entropy"))
    with pytest.raises(ValueError, match="needs a teacher's whole vocabulary"):
        aligned_loss(student, target_of(), weights)


def test_long_chunks_at_high_temperature_tend_to_a_limit():
    """T D of forward KL to a log(a / b) + b - a."""
    case = case_of()
    student = case.student(*case.leaves())
    loss = aligned_loss(student, target_of(), TermWeights(1.0, 0.0, temperature=1e6))
    members, log_p = CHUNKS[1], LOG_PROBS[1]
    a, b = -log_p, loss.ce[list(members)].sum().item()
    limit = a * torch.tensor(a / b).log().item() + b - a
    assert loss.kd[list(members)].sum().item() == pytest.approx(limit, rel=1e-4)


def test_what_does_not_fit():
    case = case_of()
    student = case.student(*case.leaves())
    with pytest.raises(ValueError, match="must have the tokens"):
        aligned_loss(student, target_of(slice(1, None)), TermWeights(1.0, 0.0))
    with pytest.raises(ValueError, match="a chunk has one"):
        aligned_loss(student, target_of(), TermWeights(1.0, 0.0, temperature=torch.ones(T)))
    with pytest.raises(ValueError, match="by aligned_loss"):
        case.call(*case.leaves(), target=target_of())
    capped = case.student(*case.leaves(), transform=LogitTransform(1.0, 30.0))
    with pytest.raises(ValueError, match="softcap=30"):
        aligned_loss(capped, target_of(), TermWeights(1.0, 0.0))
    with pytest.raises(ValueError, match="give one of each"):
        Aligned(torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.zeros(3), 1)
