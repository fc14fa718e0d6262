"""Preference of answers against dense autograd, whatever divides the vocabulary or the tokens."""

import pytest
import torch
import torch.distributed as dist

from megatron_moe_inject.losses import (
    FusedOptions,
    PreferenceSpec,
    Student,
    TermWeights,
    Vocabulary,
    answer_log_probs,
    fused_loss,
    preference_loss,
    reference,
)
from tests.harness import gloo
from tests.harness.losses_cases import VALID, FusedCase, V, assert_close

WORLD = 4
S, PAIRS = 8, 3
LENGTHS = ((3, 5), (6, 1), (2, 2))  # of chosen and rejected answers


def case_of() -> tuple[FusedCase, torch.Tensor]:
    """Of 2 p answers, p chosen before p rejected, states and labels ``[s * 2 p]``, and log-
    probabilities of the reference ``[p, 2]``."""
    case = FusedCase.make(t=S * 2 * PAIRS)
    labels = case.labels.abs().clamp(max=VALID - 1).view(S, 2 * PAIRS)
    for pair, lengths in enumerate(LENGTHS):
        for side, length in enumerate(lengths):
            column = labels[:, side * PAIRS + pair]
            column[: S - 1 - length] = -1  # the prompt
            column[S - 1] = -1  # behind the end
    case.labels = labels.flatten()
    generator = torch.Generator().manual_seed(3)
    return case, -20 * torch.rand(PAIRS, 2, generator=generator, dtype=torch.float64)


def pairs(values: torch.Tensor) -> torch.Tensor:
    return values.view(2, PAIRS).t()


def dense(case, log_ref, spec) -> dict[str, torch.Tensor]:
    """The mean over pairs of the loss, by whole logits."""
    hidden, weight = (x.clone().requires_grad_() for x in (case.hidden, case.weight))
    ce = reference.cross_entropy(hidden @ weight.t(), case.labels, valid_vocab_size=VALID)
    log_probs = pairs(-ce.view(S, -1).sum(0))
    each = pairs((case.labels >= 0).view(S, -1).sum(0)) if spec.length_normalised else 1
    ratios = (log_probs - log_ref) / each
    margin = spec.beta * (ratios[:, 0] - ratios[:, 1])
    e = spec.label_smoothing
    loss = -(1 - e) * margin.sigmoid().log() - e * (-margin).sigmoid().log()
    loss.mean().backward()
    return {"loss": loss.detach(), "hidden": hidden.grad, "weight": weight.grad}


def two_passes(student, log_ref, spec, groups=()):
    """Sums of the answers, then weighted cross-entropies; the loss of each pair."""
    with torch.no_grad():
        sums = answer_log_probs(student, None).sum(0)
    tokens = (student.labels >= 0).sum(0).double()
    for group in groups:
        dist.all_reduce(sums, group=group)
        dist.all_reduce(tokens, group=group)
    terms = preference_loss(pairs(sums), log_ref, pairs(tokens), spec)
    of_answers = (terms.weights / PAIRS).t().flatten()
    weights = TermWeights(0.0, of_answers.expand(len(student.labels), -1).flatten())
    flat = Student(
        student.hidden.flatten(0, 1), student.head, student.labels.flatten(), student.vocabulary
    )
    mask = torch.ones_like(weights.beta)
    for promise in (None, mask) if student.head.requires_grad else (None,):
        student.hidden.grad = student.head.grad = None
        options = FusedOptions(chunk_tokens=7, upstream_mask=promise)
        total = fused_loss(flat, None, weights, options).total
        total.sum().backward(retain_graph=promise is None)
    return terms.loss


def _matches(size, head, spec):
    group = gloo.block_group(size)
    case, log_ref = case_of()
    expected = dense(case, log_ref, spec)
    part = case.shard(group.rank(), size)
    hidden, weight = part.leaves(head_trains=head == "trained")
    states = hidden.view(S, 2 * PAIRS, -1)
    states.retain_grad()
    student = Student(states, weight, part.labels.view(S, -1), Vocabulary(group, VALID))
    loss = two_passes(student, log_ref, spec)
    assert_close(loss, expected["loss"], "loss")
    assert_close(states.grad.flatten(0, 1), expected["hidden"], "hidden gradient")
    if head == "trained":
        rows = expected["weight"].view(size, V // size, -1)[group.rank()]
        assert_close(weight.grad, rows, "head gradient")
    return loss


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_value_and_gradient(size, head):
    for spec in (PreferenceSpec(0.3), PreferenceSpec(2.0, True, 0.1)):
        ranks = gloo.pool(WORLD).run(_matches, size, head, spec)
        for found in ranks[1:size]:
            assert torch.equal(found, ranks[0]), "ranks disagree"


def _divided():
    """TP 2 and CP 2: half of each answer on a rank."""
    rank, spec = dist.get_rank(), PreferenceSpec(0.3, True)
    group = gloo.block_group(2)
    across = [dist.new_group([place, place + 2]) for place in (0, 1)][rank % 2]
    case, log_ref = case_of()
    expected = dense(case, log_ref, spec)
    part = case.shard(group.rank(), 2)
    rows = torch.arange(S).view(4, -1)[[rank // 2, 3 - rank // 2]].flatten()  # zig-zag
    hidden, weight = part.leaves()
    states = hidden.detach().view(S, 2 * PAIRS, -1)[rows].requires_grad_()
    labels = part.labels.view(S, -1)[rows]
    student = Student(states, weight, labels, Vocabulary(group, VALID))
    assert_close(two_passes(student, log_ref, spec, [across]), expected["loss"], "loss")
    own = expected["hidden"].view(S, 2 * PAIRS, -1)[rows]
    assert_close(states.grad, own, "hidden gradient")
    dist.all_reduce(weight.grad, group=across)
    assert_close(weight.grad, expected["weight"].view(2, V // 2, -1)[group.rank()], "head gradient")


def test_answers_that_context_parallel_ranks_share():
    gloo.pool(WORLD).run(_divided)
