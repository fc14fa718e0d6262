"""The preference loss of pairs against the formula of the paper, and against TRL's own numbers."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megatron_moe_inject.losses import FusedOptions, Student, TermWeights, fused_loss
from megatron_moe_inject.losses.preference import PreferenceSpec, answer_log_probs, preference_loss

TRL = Path(__file__).with_name("trl_dpo.safetensors")


def dense(log_probs, reference, tokens, beta, each_token, smoothing):
    """Equation 7 of 2305.18290, with labels that are wrong with some probability."""
    ratios = (log_probs - reference) / (tokens if each_token else 1.0)
    wins = torch.sigmoid(beta * (ratios[:, 0] - ratios[:, 1]))
    return -((1 - smoothing) * wins.log() + smoothing * (1 - wins).log())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("each_token", [False, True])
def test_value_and_the_weights_of_tokens(each_token, smoothing):
    generator = torch.Generator().manual_seed(0)
    log_probs, reference = -torch.rand(2, 7, 2, generator=generator, dtype=torch.float64) * 20
    tokens = torch.randint(1, 9, (7, 2), generator=generator)
    log_probs.requires_grad_()
    expected = dense(log_probs, reference, tokens, 0.3, each_token, smoothing)
    (gradient,) = torch.autograd.grad(expected.sum(), log_probs)
    spec = PreferenceSpec(0.3, each_token, smoothing)
    terms = preference_loss(log_probs.detach(), reference, tokens, spec)
    torch.testing.assert_close(terms.loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.weights, -gradient, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(terms.margins, terms.rewards[:, 0] - terms.rewards[:, 1])


def test_far_apart_answers_keep_their_digits():
    """Where sigmoid(m) is 1 in float64, and where its log is minus infinity."""
    log_probs = torch.tensor([[0.0, -4000.0], [-4000.0, 0.0]], dtype=torch.float64)
    zero = torch.zeros(2, 2)
    terms = preference_loss(log_probs, zero, zero + 5, PreferenceSpec(1.0))
    assert terms.loss.tolist() == [0.0, 4000.0]
    assert terms.weights.tolist() == [[0.0, 0.0], [1.0, -1.0]]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ((0.0,), "beta=0.0"),
        ((float("inf"),), "beta=inf"),
        ((0.1, False, 0.5), "label_smoothing=0.5"),
        ((0.1, False, -0.1), "label_smoothing=-0.1"),
    ],
)
def test_numbers_that_are_refused(values, says):
    with pytest.raises(ValueError, match=says):
        PreferenceSpec(*values)


@pytest.mark.parametrize("each_token", [False, True], ids=["sigmoid", "sigmoid_norm"])
def test_trl_gives_the_same(each_token):
    """Its loss, its gradients by states and head, and what it logs; see ``harness.trl_dpo``."""
    name = "mean" if each_token else "sum"
    with safe_open(TRL, "pt") as file:
        saved = {key: file.get_tensor(key) for key in list(file.keys())}
        beta = float(file.metadata()["beta"])
    ids, mask = saved["input_ids"], saved["completion_mask"]
    labels = torch.where(mask == 1, ids, -1)[:, 1:]
    count = len(ids) // 2  # chosen before rejected

    def student_of(who, head):
        hidden = saved[who][:, :-1].transpose(0, 1).clone()
        return Student(hidden.requires_grad_(), saved[head].clone().requires_grad_(), labels.t())

    def pairs(values):
        return values.view(2, count).t()

    student, reference = student_of("student", "head"), student_of("reference", "reference_head")
    with torch.no_grad():
        sums = [pairs(answer_log_probs(model, None).sum(0)) for model in (student, reference)]
    tokens = pairs((labels >= 0).sum(1))
    terms = preference_loss(*sums, tokens, PreferenceSpec(beta, each_token))
    assert terms.loss.mean().item() == pytest.approx(saved[f"{name} loss"].item(), rel=1e-5)
    rewards = terms.rewards * (tokens if each_token else 1)  # which TRL logs as sums
    for side, found in zip(("chosen", "rejected"), rewards.mean(0).tolist(), strict=True):
        assert found == pytest.approx(saved[f"{name} rewards/{side}"].item(), rel=1e-5)
    wins = (rewards[:, 0] > rewards[:, 1]).double().mean().item()
    assert wins == pytest.approx(saved[f"{name} rewards/accuracies"].item())

    weights = (terms.weights / count).t().flatten().float()
    flat = Student(student.hidden.flatten(0, 1), student.head, student.labels.flatten())
    of_tokens = weights.expand(labels.shape[1], -1).flatten()
    fused_loss(flat, None, TermWeights(0.0, of_tokens), FusedOptions()).total.sum().backward()
    gradient = saved[f"{name} hidden gradient"][:, :-1].transpose(0, 1)
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(student.hidden.grad, gradient, **close)
    torch.testing.assert_close(student.head.grad, saved[f"{name} head gradient"], **close)
    assert gradient.abs().max() > 1e-2
