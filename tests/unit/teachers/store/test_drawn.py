"""Drawn ids: the same ones whoever draws, unbiased, and back from their bytes."""

import math

import numpy as np
import pytest
import torch

from megatron_moe_inject.losses import reference, vocab_parallel_sparse_divergence
from megatron_moe_inject.teachers.store.drawn import drawn_rows, uniforms
from megatron_moe_inject.teachers.store.row_format import DRAWN, RowFormat


def test_random_numbers_follow_from_the_place():
    places = np.array([0, 1, 7, 2**40])
    whole = uniforms(3, places, 64)
    assert whole.shape == (4, 64)
    assert ((whole >= 0) & (whole < 1)).all()
    assert np.array_equal(uniforms(3, places[[2, 0]], 64), whole[[2, 0]])
    assert np.array_equal(uniforms(3, places, 16), whole[:, :16])
    others = [uniforms(4, places, 64), uniforms(3, places + 1, 64)]
    assert len(np.unique(np.stack([whole, others[0]]))) == 2 * whole.size
    assert np.array_equal(others[1][0], whole[1])
    many = uniforms(0, np.arange(2000), 50)
    assert abs(many.mean() - 0.5) < 3 / math.sqrt(12 * many.size)
    columns = many - 0.5
    assert abs((columns[:, 0] * columns[:, 1]).mean()) < 3 / 12 / math.sqrt(2000)
    assert abs((columns[1:, 0] * columns[:-1, 0]).mean()) < 3 / 12 / math.sqrt(2000)


def _drawn(log_probs, draws, temperature, places, labels=None):
    tokens = torch.zeros(len(log_probs), dtype=torch.int64)
    random = torch.from_numpy(uniforms(0, places, draws))
    return drawn_rows(tokens, log_probs, temperature=temperature, random=random, labels=labels)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_each_id_is_drawn_as_often_as_it_is_likely(temperature):
    vocabulary, draws, times = 30, 8, 4000
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0)) * 3
    logits[[4, 29]] = -torch.inf
    log_probs = logits.log_softmax(-1).expand(times, -1)
    rows = _drawn(log_probs, draws, temperature, np.arange(times))
    shares = torch.zeros(times, vocabulary + 1)
    shares.scatter_add_(1, rows.ids.where(rows.ids >= 0, vocabulary), rows.log_probs.exp())
    torch.testing.assert_close(shares[:, :-1].sum(-1), torch.ones(times))
    p = (logits / temperature).softmax(-1)
    sd = (p * (1 - p) / draws / times).sqrt()
    assert ((shares[:, :-1].mean(0) - p).abs() <= 4.5 * sd).all()
    # Of one draw from each part the variance is at most that of independent draws.
    assert shares[:, :-1].var(0).sum() < 0.9 * (p * (1 - p) / draws).sum()


def test_loss_and_gradient_are_unbiased():
    """For the forward KL to the whole teacher; the loss exceeds it by the teacher's entropy."""
    vocabulary, draws, times, temperature = 20, 4, 20_000, 2.0
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, vocabulary, generator=generator, dtype=torch.float64) * 2
    rows = _drawn(y.float().log_softmax(-1).expand(times, -1), draws, temperature, np.arange(times))
    student = x.expand(times, -1).clone().requires_grad_()
    loss = vocab_parallel_sparse_divergence(
        student, rows.ids, rows.log_probs.double(), tail="sample", temperature=temperature
    )
    loss.sum().backward()
    leaf = x.clone().requires_grad_()
    kl = reference.forward_kl(leaf, y, temperature=temperature)
    kl.backward()
    entropy = torch.special.entr((y / temperature).softmax(-1)).sum()
    expected = kl.detach() + temperature**2 * entropy
    assert abs(loss.mean() - expected) < 4.5 * loss.std() / math.sqrt(times)
    error = (student.grad.mean(0) - leaf.grad).abs()
    assert (error <= 4.5 * student.grad.std(0) / math.sqrt(times) + 1e-9).all()


@pytest.mark.parametrize(("vocabulary", "draws"), [(3, 5), (1000, 50), (131072, 64)])
def test_rows_come_back(vocabulary, draws):
    generator = torch.Generator().manual_seed(2)
    log_probs = (torch.randn(20, vocabulary, generator=generator) * 3).log_softmax(-1)
    labels = torch.randint(vocabulary, (20,), generator=generator)
    rows = _drawn(log_probs, draws, 1.0, np.arange(20), labels)
    layout = RowFormat(vocabulary, draws, DRAWN)
    content, counts = layout.encode(rows)
    back = layout.decode(content, counts)
    assert torch.equal(back.ids, rows.ids)
    torch.testing.assert_close(back.at(0, 2.0), rows.log_probs)
    assert torch.equal(
        back.log_probs.exp().mul(draws).round().sum(-1), torch.full((20,), 1.0 * draws)
    )
    torch.testing.assert_close(back.label, rows.label, rtol=1e-3, atol=1e-3)
    sizes = layout.bytes_of(counts.numpy())
    assert (sizes <= layout.widest).all()
