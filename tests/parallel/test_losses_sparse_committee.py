"""Committees of stored teachers and of models against plain mixtures: losses and gradients.

Shapes: t tokens, v vocabulary.
"""

import math
from dataclasses import replace

import pytest
import torch

from megatron_moe_inject.losses import (
    COMMITTEES,
    Dense,
    Mixed,
    Sparse,
    measure_tokens,
    reference,
    target_confidence,
)
from megatron_moe_inject.losses.spec import TokenWeighting
from tests.harness import gloo
from tests.harness.losses_cases import (
    HEADS,
    MIXTURE,
    VALID,
    FusedCase,
    V,
    assert_close,
    committee_case,
)
from tests.harness.losses_sparse_cases import TAIL_KINDS

WORLD = 4
T = 11


def _tables(case, target, temperature, known=True):
    """Log-probabilities [t, v] of each member, -inf where a stored one does not know them; whole
    ones unless ``known``."""
    tables = []
    for n, member in enumerate(case.options["target"].members):
        logits = reference.transformed(member.hidden @ member.head.t(), member.transform)
        table = reference.log_probs(logits, temperature, VALID)
        if known and isinstance(target.members[n], Sparse):
            ids = target.members[n].ids
            there = torch.zeros_like(table).scatter_add_(1, ids.clamp(min=0), (ids >= 0).double())
            table = table.masked_fill(there == 0, -torch.inf)
        tables.append(table)
    return tables


def _shares(case, target):
    """Log weights [members, t, 1] that sum to 1."""
    logs = []
    labels = case.labels
    for weight, table in zip(target.weights, _tables(case, target, 1.0, known=False), strict=True):
        own = torch.zeros(len(labels), dtype=torch.float64)
        if target.by == "label":
            own = table.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
            own = torch.where(labels >= 0, own, 0.0)
        if target.by == "top":
            own = table.amax(-1)
        logs.append(own + math.log(weight))
    logs = torch.stack(logs)
    return (logs - logs.logsumexp(0))[..., None]


def _mixed(case, stored, k, by="fixed", tail="bucket", temperature=2.0):
    """The case's committee of models with some members as stores of k ids each."""
    committee = case.options["target"]
    members = []
    for n, member in enumerate(committee.members):
        if n not in stored:
            members.append(member)
            continue
        logits = reference.transformed(member.hidden @ member.head.t(), member.transform)
        whole, unit = (reference.log_probs(logits, t, VALID) for t in (temperature, 1.0))
        ids = unit.topk(min(k, VALID), -1).indices
        label = unit.gather(1, case.labels.clamp(min=0)[:, None])
        unused = torch.zeros_like(ids, dtype=torch.bool)
        if k < VALID:
            unused[::3, -1] = True
        members.append(
            Sparse(
                ids.masked_fill(unused, -1),
                whole.gather(1, ids),
                tail,
                temperature,
                unit.gather(1, ids),
                label,
            )
        )
    return Mixed(tuple(members), committee.weights, by)


def _expected(case, target, tail, kind, weighting):
    """Losses and gradients of the definition in float64."""
    options = case.options
    hidden, weight = case.leaves()
    x = hidden @ weight.t()
    temperature = options["temperature"]
    shares = _shares(case, target)
    tables = torch.stack(_tables(case, target, temperature))
    stored = [n for n, m in enumerate(target.members) if isinstance(m, Sparse)]
    in_union = (tables[stored] > -torch.inf).any(0)
    ids = torch.arange(VALID).expand(T, -1).masked_fill(~in_union, -1)
    log_probs = (tables + shares).logsumexp(0).masked_fill(~in_union, -torch.inf)
    kd = reference.sparse_divergence(
        x, ids, log_probs, kind=kind, tail=tail, temperature=temperature,
        valid_vocab_size=VALID, **MIXTURE,
    )  # fmt: skip
    ce = reference.cross_entropy(x, case.labels, valid_vocab_size=VALID)
    factor = torch.ones_like(kd)
    if weighting:
        unit = torch.stack(_tables(case, target, 1.0, known=False))
        whole = (unit + shares).logsumexp(0)
        factor = reference.distillation_factor(
            x, whole, case.labels, weighting, valid_vocab_size=VALID
        )
    total = options["alpha"] * factor * kd + options["beta"] * ce
    grads = torch.autograd.grad(total, (hidden, weight), case.upstream)
    return total, kd, factor, *grads


def _matches(size, stored, k, tail, kind, by, weighting=None, temperature=2.0):
    group = gloo.block_group(size)
    case = committee_case(widths=(4, 7, 5), t=T, kind=kind, temperature=temperature)
    target = _mixed(case, stored, k, by, tail, temperature)
    total, kd, factor, by_hidden, by_head = _expected(case, target, tail, kind, weighting)
    case.options["target"], case.options["weighting"] = target, weighting
    part = case.shard(group.rank(), size)
    for head in HEADS:
        hidden, weight = part.leaves(head != "frozen")
        loss = part.call(hidden, weight, tp_group=group, chunk_tokens=4, **part.promise(head))
        loss.total.backward(part.upstream)
        assert_close(loss.total, total, "total", 1e-9)
        assert_close(loss.kd, kd, "kd", 1e-9)
        assert_close(loss.kd_factor, factor, "factor", 1e-9)
        assert_close(hidden.grad, by_hidden, "hidden gradient", 1e-9)
        if head != "frozen":
            rows = by_head.chunk(size)[group.rank()]
            assert_close(weight.grad, rows, "head gradient", 1e-9)
    return loss.total.detach()


PAIRS = [pair for pair in TAIL_KINDS if pair[0] != "sample"]


@pytest.mark.parametrize(("tail", "kind"), PAIRS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_losses_and_gradients(size, tail, kind):
    """One store beside two models, two beside one, and stores alone."""
    for by, stored in zip(COMMITTEES, ([0], [0, 2], [0, 1, 2]), strict=True):
        losses = gloo.pool(WORLD).run(_matches, size, stored, 5, tail, kind, by)
        assert all(torch.equal(loss, losses[0]) for loss in losses)


@pytest.mark.parametrize("confidence", ["none", "label"])
def test_weighted_tokens_use_the_mixtures_probability_of_the_label(confidence):
    weighting = TokenWeighting(confidence, skip_worse=True)
    for by in COMMITTEES:
        gloo.pool(WORLD).run(_matches, 4, [0, 2], 3, "bucket", "jsd", by, weighting)


def _equals_models(size, kind, by, tail):
    """All ids stored: what the models themselves give."""
    group = gloo.block_group(size)
    case = committee_case(widths=(4, 7), t=T, kind=kind, temperature=2.0)
    committee = replace(case.options["target"], by=by)
    found = []
    for target in (committee, _mixed(case, [0], VALID, by, tail)):
        case.options["target"] = target
        part = case.shard(group.rank(), size)
        hidden, weight = part.leaves()
        loss = part.call(hidden, weight, tp_group=group, chunk_tokens=4)
        loss.total.backward(part.upstream)
        found.append((loss.total, hidden.grad, weight.grad))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, "of models and of a store of all", 1e-9)


@pytest.mark.parametrize(("tail", "kind"), PAIRS)
def test_all_ids_are_the_live_committee(tail, kind):
    for by in COMMITTEES:
        gloo.pool(WORLD).run(_equals_models, 2, kind, by, tail)


def test_the_error_of_stores_with_other_ids_is_within_its_bound():
    """``sparse_committee``: beside a model none, of two stores by their unknown mass at most."""
    case = committee_case(widths=(4, 7, 5), t=T, kind="forward_kl", temperature=1.0)
    for stored, exact in (([0], True), ([0, 1, 2], False)):
        target = _mixed(case, stored, 4, temperature=1.0)
        shares = _shares(case, target)
        whole = (torch.stack(_tables(case, target, 1.0, known=False)) + shares).logsumexp(0).exp()
        tables = torch.stack(_tables(case, target, 1.0))
        union = (tables[stored] > -torch.inf).any(0)
        given = (tables + shares).logsumexp(0).exp() * union
        missing = whole * union - given
        assert (missing > -1e-12).all()
        unknown = sum(
            (shares[n].exp().squeeze(-1) * (1 - tables[n].exp().sum(-1)) for n in stored),
            start=torch.zeros(T, dtype=torch.float64),
        )
        assert (missing.sum(-1) <= unknown + 1e-12).all()
        assert bool((missing.abs() < 1e-12).all()) == exact

        x = torch.randn(T, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        ids = torch.arange(VALID).expand(T, -1).masked_fill(~union, -1)
        gradients = []
        for log_probs in (given.log(), (whole * union).log()):
            leaf = x.clone().requires_grad_()
            reference.sparse_divergence(
                leaf, ids, log_probs, tail="bucket", valid_vocab_size=VALID
            ).sum().backward()
            gradients.append(leaf.grad)
        error = (gradients[0] - gradients[1]).abs().sum(-1)
        assert (error <= 2 * missing.sum(-1) + 1e-12).all()


def _drawn_members():
    generator = torch.Generator().manual_seed(2)
    case = FusedCase.make(t=T, temperature=1.0)
    members = []
    for n in range(2):
        ids = torch.randint(0, VALID, (T, 3 + n), generator=generator)
        log_weights = torch.randn(T, 3 + n, generator=generator, dtype=torch.float64)
        label = -torch.rand(T, 1, generator=generator, dtype=torch.float64)
        members.append(Sparse(ids, log_weights, "sample", 1.0, label_log_probs=label))
    return case, members


@pytest.mark.parametrize("by", ["fixed", "label"])
def test_drawn_ids_are_weighed_by_their_teachers(by):
    """The loss is linear in draws, so that of a committee is the weighted sum of its members'."""
    case, members = _drawn_members()
    weights = torch.tensor([0.8, 0.4], dtype=torch.float64).expand(T, -1)
    if by == "label":
        label = torch.cat([member.label_log_probs for member in members], -1).exp()
        weights = torch.where(case.labels[:, None] >= 0, weights * label, weights)
    weights = weights / weights.sum(-1, keepdim=True)
    hidden, weight = case.leaves()
    each = [case.call(hidden, weight, target=member, beta=0.0).kd for member in members]
    mixed = case.call(hidden, weight, target=Mixed(tuple(members), (0.8, 0.4), by), beta=0.0).kd
    assert_close(mixed, sum(w * one for w, one in zip(weights.t(), each, strict=True)), "kd", 1e-9)


def _measured(size, stored):
    group = gloo.block_group(size)
    case = committee_case(widths=(4, 7), t=T)
    target = _mixed(case, stored, VALID)
    live = case.options["target"]
    case.options["target"] = target
    part = case.shard(group.rank(), size)
    student = part.student(part.hidden, part.weight, group)
    found = measure_tokens(student, part.options["target"], chunk_tokens=4)
    teachers = [reference.transformed(m.hidden @ m.head.t(), m.transform) for m in live.members]
    mixed = reference.mixture(teachers, live.weights, case.labels, 1.0, valid_vocab_size=VALID)
    x = (case.hidden @ case.weight.t())[:, :VALID]
    for name, value in reference.measures(x, mixed, case.labels).items():
        assert_close(getattr(found, name), value, name, 1e-6)
    sure = target_confidence(part.options["target"], "label", case.labels, student.vocabulary)
    known = case.labels >= 0
    label = mixed.gather(1, case.labels.clamp(min=0)[:, None]).squeeze(1).exp() * known
    assert_close(sure, label, "label's probability", 1e-6)
    top = target_confidence(part.options["target"], "top", case.labels, student.vocabulary)
    assert_close(top, mixed.exp().amax(-1), "top probability", 1e-6)


@pytest.mark.parametrize("stored", [[0], [0, 1]])
@pytest.mark.parametrize("size", [1, 2])
def test_measures_and_confidence(size, stored):
    gloo.pool(WORLD).run(_measured, size, stored)


def test_a_row_that_has_an_id_twice_is_no_number():
    ids = torch.tensor([[1, 1], [1, 2]])
    stored = Sparse(ids, torch.full((2, 2), -1.0, dtype=torch.float64), "bucket")
    case = FusedCase.make(t=2, temperature=1.0)
    model = Dense(case.teacher_hidden, case.teacher_weight)
    hidden, weight = case.leaves()
    kd = case.call(hidden, weight, target=Mixed((stored, model), (0.5, 0.5))).kd
    assert kd.isfinite().tolist() == [False, True]
