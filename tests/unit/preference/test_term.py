"""The weights of answers in the loss of a micro-batch."""

import pytest
import torch

from megatron_moe_inject.host.labels import GENERAL, PREFERENCE
from megatron_moe_inject.losses import FusedOptions, Student, reference
from megatron_moe_inject.losses.objective import SampleGroup, TermWeights, injection_loss
from megatron_moe_inject.preference.term import PreferenceTerm

S, B, H, V = 5, 4, 6, 9
DOMAINS = [PREFERENCE, GENERAL, PREFERENCE, 0]
WEIGHTS = {(1, 0): 0.25, (1, 2): -0.5}


@pytest.fixture
def given():
    torch.manual_seed(0)
    labels = torch.randint(V, (B, S))
    labels[0, :2] = labels[2, 3:] = -1
    hidden = torch.randn(S, B, H, requires_grad=True)
    return Student(hidden, torch.randn(V, H, requires_grad=True), labels.t()), labels


def term_of(scale=3.0):
    term = PreferenceTerm()
    rows = torch.full((2, B, S), -1)
    for row, (micro_batch, sample) in enumerate(WEIGHTS):
        rows[micro_batch, sample] = row
    term.begin(rows, torch.tensor(list(WEIGHTS.values())), torch.tensor(scale))
    return term


@pytest.mark.parametrize("promised", [False, True])
def test_answers_weigh_by_pair_and_text_by_class(given, promised):
    """What the script's loss divides by does not touch them; the gradient is the dense one's."""
    student, labels = given
    groups = [
        SampleGroup([0, 2], TermWeights(0.0, 0.0)),
        SampleGroup([1, 3], TermWeights(0.0, 0.7)),
    ]
    term, mask = term_of(), torch.ones(B, S)
    weighed = term.weighed(groups, 1, DOMAINS)
    assert weighed[1] is groups[1]
    options = FusedOptions(upstream_mask=mask.t() if promised else None)
    terms = term.attached(injection_loss(student, weighed, options), DOMAINS, mask)
    assert not terms.total[[0, 2]].any()
    loss = (terms.total * mask).sum() / 7
    gradients = torch.autograd.grad(loss, (student.hidden, student.head))

    hidden, head = (x.detach().clone().requires_grad_() for x in (student.hidden, student.head))
    ce = reference.cross_entropy((hidden @ head.t()).transpose(0, 1), labels)
    text = 0.7 * ce[[1, 3]].sum() / 7
    answers = 3.0 * (0.25 * ce[0].sum() - 0.5 * ce[2].sum())
    assert loss.item() == pytest.approx(text.item(), rel=1e-6)
    expected = torch.autograd.grad(text + answers, (hidden, head))
    torch.testing.assert_close(gradients, expected)


def test_a_micro_batch_of_answers_alone_has_a_graph(given):
    student, _ = given
    term = PreferenceTerm()
    term.begin(torch.arange(B).expand(S, -1).t()[None], torch.ones(B), torch.ones(()))
    domains = [PREFERENCE] * B
    groups = term.weighed([SampleGroup(range(B), TermWeights(0.0, 0.0))], 0, domains)
    terms = term.attached(injection_loss(student, groups), domains, torch.ones(B, S))
    assert terms.total.sum().item() == 0
    (gradient,) = torch.autograd.grad(terms.total.sum(), student.hidden)
    assert gradient.abs().max() > 0


def test_a_micro_batch_without_answers_is_as_it_was(given):
    student, _ = given
    groups = [SampleGroup(range(B), TermWeights(0.0, 0.7))]
    domains = [GENERAL] * B
    term = term_of()
    assert term.weighed(groups, 1, domains) == groups
    terms = injection_loss(student, groups)
    assert term.attached(terms, domains, torch.ones(B, S)) is terms
