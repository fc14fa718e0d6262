"""Sampled teachers: their gradient is that of the whole forward KL on average."""

from itertools import product

import pytest
import torch

from megatron_moe_inject.losses import reference, sample_teacher
from tests.harness.losses_cases import assert_close, logits
from tests.harness.losses_forms import Form
from tests.harness.losses_sparse_cases import store

SAMPLED, TOP = Form("forward_kl", "sample"), Form("forward_kl", "renormalize")


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
    loss, gradient = SAMPLED.value_and_gradient(
        students, (ids, log_weights), temperature=temperature
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
    _, gradient = SAMPLED.value_and_gradient(
        x.expand(repeats, -1), (ids, log_weights), temperature=temperature
    )
    expected = _forward_kl_gradient(x, y, temperature)[0]
    sigma = gradient.std(0) / repeats**0.5
    assert ((gradient.mean(0) - expected).abs() <= 5 * sigma).all()
    biased = TOP.value_and_gradient(
        x, store(y, 4, temperature, unused=False), temperature=temperature
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
