"""The objective on a micro-batch of mixed samples, against per-token references."""

import dataclasses

import pytest
import torch

from megatron_moe_inject.host.attached_loss import (
    take_terms,
)
from megatron_moe_inject.host.labels import (
    GENERAL,
)
from megatron_moe_inject.losses import Dense, FusedOptions, Sparse, Student, Vocabulary, reference
from megatron_moe_inject.losses.objective import (
    LossTerms,
    SampleGroup,
    TermWeights,
    injection_loss,
)
from megatron_moe_inject.losses.report import LossReport, merge
from megatron_moe_inject.losses.spec import Divergence, LogitTransform, TokenWeighting

S, B, H, HT, V, VALID = 5, 4, 8, 6, 16, 13
VOCABULARY = Vocabulary(None, VALID)


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(S, B, H, requires_grad=True),
        "head": torch.randn(V, H),
        "labels": torch.randint(VALID, (B, S)),
        "teachers": [torch.randn(2, S, HT), torch.randn(1, S, HT)],
        "heads": [torch.randn(V, HT), torch.randn(V, HT)],
    }


def student(tensors, **options):
    return Student(tensors["hidden"], tensors["head"], tensors["labels"].t(), VOCABULARY, **options)


def groups(tensors):
    """Samples 3 and 0 learn from one teacher, 2 from another, 1 is general."""
    return [
        SampleGroup(
            [0, 3],
            TermWeights(0.7, 0.3, temperature=2.0),
            Dense(tensors["teachers"][0], tensors["heads"][0]),
        ),
        SampleGroup([1], TermWeights(0.0, 0.5)),
        SampleGroup(
            [2],
            TermWeights(1.0, 0.0, Divergence("reverse_kl"), 1.0, TokenWeighting("label")),
            Dense(tensors["teachers"][1], tensors["heads"][1], LogitTransform(0.5, 4.0)),
        ),
    ]


def kl(student, teacher, kind, temperature):
    function = {"forward_kl": reference.forward_kl, "reverse_kl": reference.reverse_kl}[kind]
    return function(student, teacher, temperature=temperature, valid_vocab_size=VALID)


def test_mixed_samples_each_get_their_own_loss_and_gradient(tensors):
    transform = LogitTransform(scale=1.5)
    loss = injection_loss(student(tensors, transform=transform), groups(tensors))
    hidden = tensors["hidden"].detach().clone().requires_grad_(True)
    logits = (hidden @ tensors["head"].t()).transpose(0, 1) * transform.scale
    ce = reference.cross_entropy(logits, tensors["labels"], valid_vocab_size=VALID)
    expected, kd, factor = [None] * B, torch.zeros(B, S), torch.ones(B, S)
    for group in groups(tensors):
        for row, sample in enumerate(group.samples):
            w = group.weights
            expected[sample] = w.beta * ce[sample]
            if group.target is not None:
                teacher = reference.transformed(
                    group.target.hidden[row] @ group.target.head.t(), group.target.transform
                )
                value = kl(logits[sample], teacher, w.divergence.kind, w.temperature)
                kd[sample] = value.detach()
                if w.weighting:
                    factor[sample] = reference.distillation_factor(
                        *(logits[sample], teacher, tensors["labels"][sample], w.weighting),
                        valid_vocab_size=VALID,
                    )
                expected[sample] = expected[sample] + w.alpha * factor[sample] * value
    expected = torch.stack(expected)
    weight = torch.rand(B, S)
    (loss.total * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(loss.ce, ce.detach())
    torch.testing.assert_close(loss.kd, kd)
    torch.testing.assert_close(loss.kd_factor, factor)
    assert (factor[2] < 1).all()
    torch.testing.assert_close(tensors["hidden"].grad, hidden.grad)


def test_the_order_of_groups_does_not_matter(tensors):
    mixed = groups(tensors)
    one = injection_loss(student(tensors), mixed)
    other = injection_loss(student(tensors), mixed[::-1])
    for a, b in zip(vars(one).values(), vars(other).values(), strict=True):
        torch.testing.assert_close(a, b)


def test_every_group_gets_its_part_of_the_mask(tensors):
    """A part that belongs to other samples would make the head's gradient NaN."""
    mask = (torch.rand(B, S) > 0.4).float()
    assert mask.sum() not in (0, B * S)
    head = tensors["head"].requires_grad_()
    gradients = []
    for upstream_mask in (None, mask.t()):
        options = FusedOptions(upstream_mask=upstream_mask)
        loss = injection_loss(student(tensors), groups(tensors), options)
        total = (loss.total * mask).sum() / 7
        gradients.append(torch.autograd.grad(total, (tensors["hidden"], head)))
    torch.testing.assert_close(*gradients)


def test_samples_left_out_or_taken_twice_are_a_bug(tensors):
    mixed = groups(tensors)
    with pytest.raises(AssertionError, match="partition"):
        injection_loss(student(tensors), mixed[:2])


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_a_teacher_by_stored_ids_is_one_beside_others(tensors, tail):
    """All ids stored: the loss of the teacher itself, sample by sample."""
    whole = groups(tensors)
    logits = (tensors["teachers"][0] @ tensors["heads"][0].t())[..., :VALID]
    ids = torch.arange(VALID).expand(logits.shape)
    stored = Sparse(ids, (logits / 2.0).log_softmax(-1), tail, temperature=2.0)
    gradients, losses = [], []
    for target in (whole[0].target, stored):
        own = [dataclasses.replace(whole[0], target=target), *whole[1:]]
        loss = injection_loss(student(tensors), own)
        losses.append(loss.kd)
        gradients.append(torch.autograd.grad(loss.total.sum(), tensors["hidden"])[0])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)
    assert losses[0][[0, 3]].min() > 1e-3


def terms():
    return LossTerms(
        total=torch.ones(2, 3),
        ce=torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        kd=torch.tensor([[0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]),
        kd_factor=torch.tensor([[0.25, 0.5, 0.0], [1.0, 1.0, 1.0]]),
    )


def test_report_sums_by_class_under_the_loss_mask():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    report = LossReport(["code", "law"], distilled=[0], by_class=True)
    values = report.values(terms(), mask, [0, GENERAL])
    pairs = {name: [round(x, 6) for x in value.tolist()] for name, value in values.items()}
    assert pairs == {
        "lm loss": [7.0, 3.0],
        "kd loss": [1.0, 2.0],
        "lm loss/general": [4.0, 1.0],
        "lm loss/code": [3.0, 2.0],
        "kd loss/code": [1.0, 2.0],
        "lm loss/law": [0.0, 0.0],
    }


def test_report_of_weighted_tokens():
    report = LossReport(["code"], distilled=[0], by_class=True, weighted=True)
    values = report.values(terms(), torch.tensor([[1, 1, 0], [1, 0, 0]]), [0, GENERAL])
    for name in ("kd factor", "kd factor/code"):
        assert [round(x, 6) for x in values[name].tolist()] == [0.75, 2.0]


def test_a_class_without_tokens_has_none_and_counts_are_exact():
    report = LossReport(["code"], distilled=[0], by_class=True)
    values = report.values(terms(), torch.ones(2, 3), [GENERAL, GENERAL])
    assert values["kd loss/code"].tolist() == [0.0, 0.0]
    assert values["lm loss"][1].item() == 6.0


def test_stock_loss_becomes_the_total():
    stock = {"lm loss": torch.tensor([9.0, 3.0]), "other": torch.tensor([1.0, 1.0])}
    report = merge(stock, {"lm loss": torch.tensor([6.0, 3.0])})
    names, sums = take_terms([report])
    assert (names, sums.tolist()) == (["lm loss"], [[6.0, 3.0]])
    assert {name: value.tolist() for name, value in report.items()} == {
        "other": [1.0, 1.0],
        "total loss": [9.0, 3.0],
    }


def test_where_a_teacher_cannot_be_asked_nothing_is_distilled_or_counted(tensors):
    """What its states say there changes neither loss nor gradient nor report."""
    readable = torch.tensor([[True, True, False, False, False], [True] * S])
    found = []
    for noise in (0.0, 3.0):
        own = groups(tensors)
        target = own[0].target.changed(lambda states, n=noise: states + n * ~readable[..., None])
        own[0] = dataclasses.replace(own[0], target=target, readable=readable)
        hidden = tensors["hidden"].detach().clone().requires_grad_(True)
        terms = injection_loss(student(tensors | {"hidden": hidden}), own)
        terms.total.sum().backward()
        report = LossReport(["a", "b"], [0, 1], by_class=True, weighted=True)
        values = report.values(terms, torch.ones(B, S), [0, GENERAL, 1, 0])
        found.append((terms, hidden.grad, values))
    (terms, gradient, values), (others, other_gradient, other_values) = found
    for name, value in vars(terms).items():
        assert torch.equal(value, getattr(others, name)), name
    assert torch.equal(gradient, other_gradient)
    assert all(torch.equal(values[name], other_values[name]) for name in values)
    assert torch.equal(terms.readable[[0, 3]], readable)
    assert terms.readable[1:3].all()
    assert not terms.kd[0, 2:].any()
    assert not terms.kd_factor[0, 2:].any()
    assert torch.equal(terms.total[0, 2:], 0.3 * terms.ce[0, 2:])
    assert values["kd loss/a"][1].item() == pytest.approx(2 + S)
    assert values["lm loss/a"][1].item() == pytest.approx(2 * S)
    assert values["kd loss"][1].item() == pytest.approx(2 + 2 * S)
    assert values["kd factor/a"][0].item() == pytest.approx(2 + S)
