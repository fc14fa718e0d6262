"""The plain references mean what their names say: against torch, known limits, and gradcheck."""

import pytest
import torch
import torch.nn.functional as F

from megatron_moe_inject.losses import reference
from tests.harness.losses_cases import KINDS, REFERENCES, VALID, V, assert_close, logits


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    x, y = logits(0, 4, 9)

    def loss(student):
        return REFERENCES[kind](student, y, temperature=1.7, valid_vocab_size=7)

    assert torch.autograd.gradcheck(loss, x.requires_grad_())


def test_kl_is_torch_kl():
    x, y = logits(1, 4, V)
    p, q = torch.log_softmax(y / 3, -1), torch.log_softmax(x / 3, -1)
    forward = 9 * F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    reverse = 9 * F.kl_div(p, q, log_target=True, reduction="none").sum(-1)
    assert_close(reference.forward_kl(x, y, temperature=3.0), forward, "forward")
    assert_close(reference.reverse_kl(x, y, temperature=3.0), reverse, "reverse")


def test_mixtures_are_kls_to_the_mixture():
    x, y = logits(2, 4, V)
    p, q = y.softmax(-1), x.softmax(-1)

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    m = 0.3 * p + 0.7 * q
    assert_close(reference.jsd(x, y, beta=0.3), 0.3 * kl(p, m) + 0.7 * kl(q, m), "jsd")
    assert_close(reference.skew_kl(x, y, alpha=0.3), kl(p, m), "skew_kl")


def test_mixtures_approach_the_pure_kls():
    x, y = logits(3, 4, V, scale=1.0)
    small = 1e-7
    forward, reverse = reference.forward_kl(x, y), reference.reverse_kl(x, y)
    assert_close(reference.jsd(x, y, beta=small) / small, forward, "jsd, beta to 0", 1e-4)
    assert_close(reference.jsd(x, y, beta=1 - small) / small, reverse, "jsd, beta to 1", 1e-4)
    assert_close(reference.skew_kl(x, y, alpha=small), forward, "skew, alpha to 0", 1e-4)


def test_cross_entropy_is_torch_cross_entropy():
    x, _ = logits(4, 5, V)
    labels = torch.tensor([0, -100, 16, 3, -1])
    expected = F.cross_entropy(
        x[:, :VALID], labels.where(labels >= 0, -100), ignore_index=-100, reduction="none"
    )
    assert_close(reference.cross_entropy(x, labels, valid_vocab_size=VALID), expected, "CE")


@pytest.mark.parametrize("kind", KINDS)
def test_padding_means_minus_infinity_on_both_sides(kind):
    x, y = logits(5, 4, V)
    x_masked, y_masked = x.clone(), y.clone()
    x_masked[:, VALID:] = y_masked[:, VALID:] = -torch.inf
    cut = REFERENCES[kind](x, y, valid_vocab_size=VALID)
    assert_close(REFERENCES[kind](x_masked, y_masked), cut, kind)


def test_teacher_may_exclude_ids():
    x, y = logits(6, 4, V)
    y[:, 5:] = -torch.inf
    for kind in ("forward_kl", "jsd", "skew_kl"):
        assert REFERENCES[kind](x, y).isfinite().all(), kind
    assert (reference.reverse_kl(x, y) == torch.inf).all()
