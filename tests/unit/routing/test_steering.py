"""Steering on Megatron's own router: maths, gradients over a step, and the stock losses' peace."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss

from megatron_moe_inject.experts.train.freeze import FreezePolicy
from megatron_moe_inject.host.attached_loss import (
    take_terms,
)
from megatron_moe_inject.host.routing_watch import (
    router_distribution,
)
from megatron_moe_inject.routing import steering_loss
from megatron_moe_inject.routing.balance import GeneralBalance
from megatron_moe_inject.routing.losses import (
    SCORE_FUNCTIONS,
    router_divergences,
    steering_losses,
    target_balance_losses,
)
from megatron_moe_inject.routing.part import write_details
from megatron_moe_inject.routing.steering import SteeringHook, SteeringWeights
from tests.harness.routers import EXPERTS, GROUPS, LENGTH, Chunk, inputs

GENERAL = -1
LABELS = torch.tensor([[0, GENERAL], [GENERAL, GENERAL], [1, 0]])
TARGETS = {
    0: torch.tensor([[0] * 6, [0, 1, 0, 1, 0, 0], [0] * 6], dtype=torch.bool),
    1: torch.tensor([[0] * 6, [0, 0, 0, 0, 1, 1], [1, 0, 0, 0, 0, 1]], dtype=torch.bool),
}


@pytest.fixture(autouse=True)
def no_device(monkeypatch):
    """Megatron's router asks for its device, and its reductions take no group of ours."""
    monkeypatch.setattr("torch.cuda.current_device", lambda: torch.device("cpu"))
    asked = "megatron.core.tensor_parallel.mappings.get_tensor_model_parallel_group_if_none"
    monkeypatch.setattr(asked, lambda group, *_, **__: group)
    yield
    get_moe_metrics_tracker().metrics.clear()


def tokens(count=40, seed=1):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, EXPERTS, generator=generator, dtype=torch.float64).mul(2)
    mask = torch.rand(count, EXPERTS, generator=generator) < 0.4
    weight = torch.rand(count, generator=generator).double()
    return logits.requires_grad_(), mask, weight


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_the_distribution_is_that_of_megatrons_balance_losses(score_function):
    logits = tokens()[0].detach().float()
    _, expected = compute_routing_scores_for_aux_loss(logits, 2, score_function)
    assert torch.equal(router_distribution(logits, score_function), expected)


def test_the_loss_is_the_weighted_mean_of_a_hinge_on_log_mass():
    logits, mask, weight = tokens()
    probs = logits.softmax(-1)
    total = 0.0
    for p, m, w in zip(probs, mask, weight, strict=True):
        mass = sum(p[e] for e in range(EXPERTS) if m[e])
        if m.any() and mass < 0.5:
            total = total + w * (torch.log(torch.tensor(0.5)) - torch.log(mass))
    expected = total / weight.sum()
    loss = steering_loss(probs, mask, weight, target_mass=0.5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    theirs = torch.autograd.grad(expected, logits)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


def test_it_stops_at_the_target_mass_and_pushes_below():
    probs = torch.tensor([[0.4, 0.2, 0.4], [0.2, 0.1, 0.7]], requires_grad=True)
    mask = torch.tensor([[True, True, False]] * 2)
    steering_losses(probs, mask, target_mass=0.5).sum().backward()
    assert torch.equal(probs.grad[0], torch.zeros(3))
    assert probs.grad[1, 0] == probs.grad[1, 1] < 0
    assert probs.grad[1, 2] == 0


def test_without_weight_it_is_zero_with_a_graph():
    logits, mask, weight = tokens()
    loss = steering_loss(logits.softmax(-1), mask, weight * 0, target_mass=0.5)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("mass", [0.0, 1.5, -1])
def test_a_target_mass_that_is_no_share(mass):
    with pytest.raises(ValueError, match="target_mass"):
        steering_loss(torch.ones(1, 2), torch.ones(1, 2) > 0, torch.ones(1), target_mass=mass)


def test_full_experts_count_but_are_not_pushed_to():
    logits, mask, _ = tokens()
    full = torch.tensor([True, False, False, True, False, False])
    probs = logits.softmax(-1).float()
    plain = steering_losses(probs, mask, target_mass=0.9)
    held = steering_losses(probs, mask, target_mass=0.9, full=full)
    assert torch.equal(plain, held)
    only_full = (mask & ~full).sum(-1) == 0
    grad = torch.autograd.grad(held.sum(), logits, retain_graph=True)[0]
    assert torch.equal(grad[only_full], torch.zeros_like(grad[only_full]))
    assert (grad[~only_full & (held > 0)] != 0).any()


def test_balance_within_targets_is_one_when_even_and_moves_the_split_alone():
    logits, _, _ = tokens()
    mask = torch.tensor([True, False, True, True, False, False]).expand(40, -1)
    even = mask / 3
    probs = logits.softmax(-1)
    uniform = torch.full((40, EXPERTS), 1 / EXPERTS)
    assert torch.allclose(target_balance_losses(uniform, mask, even), torch.ones(40))
    skewed = torch.tensor([0.8, 0, 0.1, 0.1, 0, 0]).expand(40, -1)
    grad = torch.autograd.grad(target_balance_losses(probs, mask, skewed).sum(), logits)[0]
    assert (grad[:, 0] > 0).all()
    assert (grad[:, [2, 3]] < 0).all()
    assert grad[:, [1, 4, 5]].abs().max() < 1e-6


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_divergence_of_routers(score_function):
    logits, other = tokens()[0], tokens(seed=2)[0].detach()
    same = router_divergences(logits, logits.detach(), score_function)
    assert torch.equal(same, torch.zeros(40))
    found = router_divergences(logits, other, score_function)
    p, q = (router_distribution(x, score_function).double() for x in (other, logits))
    expected = (p * (p.log() - q.log())).sum(-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    ours = torch.autograd.grad(found.sum(), logits)[0]
    theirs = torch.autograd.grad(expected.sum(), logits)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


WEIGHTS = SteeringWeights(coeff=0.3, balance=0.2, retention=0.7)


def stepped(
    chunk, weights=WEIGHTS, labels=LABELS, target_mass=0.6, confidences=None, means=None, **options
):
    """A step in 1F1B order with no other loss; the values that were reported."""
    originals = {r.weight: r.weight.detach() * 0.9 for r in chunk.routers}
    hook = SteeringHook(
        [chunk],
        GROUPS,
        TARGETS,
        lambda iteration: weights,
        target_mass=target_mass,
        original=originals.__getitem__,
        stock_balance=options.pop("stock_balance", True),
        bias_counts=options.pop("bias_counts", 0.0),
        weighs=None if confidences is None else {0: "code", 1: "prose"},
        by_token=confidences is not None and confidences.any().item(),
    )
    hook.begin(labels, 0, LENGTH, confidences, means)
    waiting = []
    for hidden in inputs(len(labels)):
        waiting.append(chunk(hidden.clone().requires_grad_()))
        if len(waiting) == 2:
            (waiting.pop(0).sum() * 0).backward()
    (waiting.pop(0).sum() * 0).backward()
    reports = [{}, {}, {}]
    hook.end(reports)
    names, sums = take_terms(reports)
    return dict(zip(names, sums.tolist(), strict=True))


def expected_losses(chunk, weights=WEIGHTS, labels=LABELS, target_mass=0.6):
    """The same from its definition, over the tokens of the whole step."""
    losses = {"steering": [], "balance": [], "retention": []}
    function = chunk.config.moe_router_score_function
    states = inputs(len(labels))
    for layer, router in enumerate(chunk.routers):
        rows = {"logits": [], "original": [], "targets": [], "label": [], "shares": []}
        for position, hidden in enumerate(states):
            logits = hidden @ router.weight.t()
            _, chosen = type(router).routing(router, logits)
            index = labels[position] + 1
            mask = TARGETS[layer][index].expand(LENGTH, -1, -1)
            hits = chosen.view_as(mask) & mask
            for sample in range(len(index)):
                whole = hits[:, labels[position] == labels[position, sample]].sum((0, 1)).float()
                if whole.sum() > 0:
                    share = whole / whole.sum()
                else:
                    share = mask[0, sample] / mask[0, sample].sum().clamp(min=1)
                rows["shares"].append(share.expand(LENGTH, -1))
                rows["logits"].append(logits[:, sample])
                rows["original"].append((hidden @ (router.weight.detach() * 0.9).t())[:, sample])
                rows["targets"].append(mask[:, sample])
                rows["label"].append(labels[position, sample].expand(LENGTH))
            states[position] = torch.tanh(hidden)
        whole = {name: torch.cat(parts) for name, parts in rows.items()}
        probs = router_distribution(whole["logits"], function)
        steered = whole["targets"].any(-1).float()
        losses["steering"].append(
            steering_loss(probs, whole["targets"], steered, target_mass=target_mass)
        )
        within = target_balance_losses(probs, whole["targets"], whole["shares"])
        losses["balance"].append((within * steered).sum() / steered.sum())
        general = (whole["label"] == GENERAL).float()
        divergence = router_divergences(whole["logits"], whole["original"], function)
        losses["retention"].append((divergence * general).sum() / general.sum())
    return losses


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_a_steps_gradient_is_that_of_its_definition(recompute, function):
    chunk = Chunk(recompute, moe_router_score_function=function, moe_router_pre_softmax=True)
    expected = expected_losses(chunk)
    total = 0.3 * sum(expected["steering"]) + 0.2 * sum(expected["balance"])
    total = total + 0.7 * sum(expected["retention"])
    gradients = torch.autograd.grad(total, [r.weight for r in chunk.routers])
    values = stepped(chunk)
    for router, gradient in zip(chunk.routers, gradients, strict=True):
        torch.testing.assert_close(router.weight.grad, gradient, rtol=1e-4, atol=1e-6)
    for name, key in (
        ("steering loss", "steering"),
        ("target balance loss", "balance"),
        ("router retention", "retention"),
    ):
        sums = [values[name][0], values[name][1]]
        counted = {"retention": (3, 3), "steering": (2, 3), "balance": (2, 3)}[key]
        mean = sum(v.item() * n for v, n in zip(expected[key], counted, strict=True))
        assert sums[0] / sums[1] == pytest.approx(mean / sum(counted), rel=1e-4), name


def test_confidence_weighs_the_mean_over_the_step():
    chunk = Chunk()
    generator = torch.Generator().manual_seed(5)
    sure = torch.rand(*LABELS.shape, LENGTH, generator=generator)
    total = 0.0
    for layer, router in enumerate(chunk.routers):
        losses, weights = [], []
        for position, hidden in enumerate(inputs(len(LABELS))):
            states = hidden if layer == 0 else torch.tanh(hidden)
            probs = (states @ router.weight.t()).softmax(-1)
            mask = TARGETS[layer][LABELS[position] + 1].expand(LENGTH, -1, -1)
            losses.append(steering_losses(probs, mask, target_mass=0.6))
            weights.append(sure[position].t() * mask.any(-1))
        losses, weights = torch.stack(losses), torch.stack(weights)
        total = total + (losses * weights).sum() / weights.sum()
    gradients = torch.autograd.grad(0.3 * total, [r.weight for r in chunk.routers])
    stepped(chunk, SteeringWeights(0.3, 0.0, 0.0), confidences=sure)
    for router, gradient in zip(chunk.routers, gradients, strict=True):
        torch.testing.assert_close(router.weight.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("by_token", [False, True])
def test_a_mean_weighs_all_tokens_of_its_domain(by_token):
    """As if each token had it, beside domains whose tokens have weights of their own or none."""
    generator = torch.Generator().manual_seed(5)
    own = torch.rand(*LABELS.shape, LENGTH, generator=generator) * by_token
    own[LABELS == 0] = 0
    whole = own + 0.3 * (LABELS == 0).unsqueeze(-1)
    reports, gradients = [], []
    for confidences, means in ((own, {0: 0.3}), (whole, None)):
        chunk = Chunk()
        reports.append(stepped(chunk, confidences=confidences, means=means))
        gradients.append([router.weight.grad for router in chunk.routers])
    torch.testing.assert_close(*gradients)
    for name in reports[0]:
        assert reports[0][name] == pytest.approx(reports[1][name]), name
    total, count = reports[0]["teacher confidence/code"]
    assert total / count == pytest.approx(0.3)


def balanced(kind, per_token, labels, in_row=False):
    """A router's gradient of its stock balance loss on one micro-batch, and what it logs of it.

    ``None`` = stock, on general samples alone; ``in_row``: general tokens are told one by one, as
    where samples are packed.
    """
    get_moe_metrics_tracker().metrics.clear()
    chunk = Chunk(
        moe_router_load_balancing_type=kind,
        moe_aux_loss_coeff=0.5,
        calculate_per_token_loss=per_token,
    )
    router = chunk.routers[0]
    hidden = inputs(1, samples=4)[0]
    if labels is not None:
        balance = GeneralBalance(router, 0.0)
        balance.general = ([i for i, label in enumerate(labels) if label == GENERAL], 4)
        if in_row:
            balance.rows = (torch.tensor(labels) == GENERAL).repeat(len(hidden))
        samples = slice(None)
    else:
        samples = [1, 3]
    gates, _ = router(hidden[:, samples].clone().requires_grad_())
    (gates.sum() * 0).backward()
    logged = {name: entry.values for name, entry in get_moe_metrics_tracker().metrics.items()}
    return router.weight.grad, logged


@pytest.mark.parametrize("in_row", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_stock_balance_of_a_mixed_batch_is_that_of_its_general_samples(kind, per_token, in_row):
    """Where half the samples are general, theirs, with the weight they had among all tokens.

    With ``calculate_per_token_loss`` Megatron weighs by tokens, in the gradient and not in the log.
    """
    gradient, logged = balanced(kind, per_token, [0, GENERAL, 0, GENERAL], in_row)
    alone, logged_alone = balanced(kind, per_token, None)
    torch.testing.assert_close(gradient, alone if per_token else alone / 2, rtol=1e-4, atol=1e-7)
    assert len(logged) == 1
    assert logged.keys() == logged_alone.keys()
    for name, values in logged.items():
        assert values.any()
        torch.testing.assert_close(values, logged_alone[name] / 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_stock_balance_without_general_samples_is_nothing(kind, per_token):
    gradient, logged = balanced(kind, per_token, [0] * 4)
    assert torch.equal(gradient, torch.zeros(EXPERTS, 8))
    assert not any(values.any() for values in logged.values())


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_expert_bias_counts_weigh_domain_tokens(weight):
    chunk = Chunk(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    router = chunk.routers[0]
    balance = GeneralBalance(router, weight)
    hidden = inputs(1, samples=3)[0]
    router(hidden)  # nothing steered: stock counts
    assert router.local_tokens_per_expert.sum() == 3 * LENGTH * 2
    router.local_tokens_per_expert.zero_()
    balance.general = ([0, 2], 3)
    _, chosen = router(hidden)
    by_sample = chosen.view(LENGTH, 3, EXPERTS).sum(0).float()
    expected = by_sample[0] + by_sample[2] + weight * by_sample[1]
    assert torch.equal(router.local_tokens_per_expert, expected)
    router.local_tokens_per_expert.zero_()
    balance.rows = torch.tensor([True, False, True]).repeat(LENGTH)
    router(hidden)
    assert torch.equal(router.local_tokens_per_expert, expected)
    balance.rows = None
    router.local_tokens_per_expert.zero_()
    with torch.no_grad():
        router(hidden)
    assert router.local_tokens_per_expert.sum() == 0


@pytest.mark.parametrize("knows", [True, False], ids=["0.19", "0.18"])
def test_a_frozen_routers_bias_is_not_moved_by_steering(knows):
    """Where Megatron does not know frozen biases, what it is updated by stays 0."""
    chunk = Chunk(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    router = chunk.routers[0]
    if not knows:
        del router.frozen_expert_bias
    FreezePolicy({}, frozenset()).apply([chunk])
    balance = GeneralBalance(router, 0.25)
    balance.general = ([0, 2], 3)
    router(inputs(1, samples=3)[0])
    assert router.frozen_expert_bias
    assert bool(router.local_tokens_per_expert.any()) is knows


def test_details_go_to_tensorboard_and_wandb(monkeypatch):
    written, logged = [], []
    writer = SimpleNamespace(add_scalar=lambda *scalar: written.append(scalar))
    wandb = SimpleNamespace(log=lambda *entry: logged.append(entry))
    monkeypatch.setattr("megatron.training.get_tensorboard_writer", lambda: writer)
    monkeypatch.setattr("megatron.training.get_wandb_writer", lambda: wandb)
    write_details({"a": 0.5, "b": 2.0}, 7)
    assert written == [("a", 0.5, 7), ("b", 2.0, 7)]
    assert logged == [({"a": 0.5, "b": 2.0}, 7)]
