"""Rows of a stored teacher in a loss that goes by chunks: statistics, then gradients in place."""

import pytest
import torch

from megatron_moe_inject.losses import Sparse
from megatron_moe_inject.losses.rows import LogitRows
from megatron_moe_inject.losses.sparse import SparseRows, sparse_gradient, sparse_statistics
from megatron_moe_inject.losses.spec import Divergence, LogitTransform, VocabShard
from tests.harness.losses_cases import MIXTURE, V, assert_close, logits
from tests.harness.losses_forms import STORED

every_form = pytest.mark.parametrize("form", STORED, ids=str)


@every_form
def test_parts_on_a_chunk_with_a_temperature_per_token(form):
    """As a chunked loss uses them: rows of a target, weights with zeros, in place."""
    x, y = logits(10, 8, V)
    temperature = torch.linspace(0.5, 4.0, 8, dtype=torch.float64)
    ids, log_probs = form.teacher(y, 4, temperature[:, None])
    ids[6, 1] = V
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    whole = SparseRows.of(
        Sparse(ids, log_probs, form.tail), kind=form.kind, vocab_size=V, dtype=torch.float64
    )
    chunk = slice(2, 8)
    shard, divergence = VocabShard(0, V, None, V), Divergence(form.kind, **MIXTURE)
    part = LogitRows(x[chunk].clone(), None, None, temperature[chunk])
    target = whole.rows(chunk)
    stats = sparse_statistics(part, target, divergence, shard)
    sparse_gradient(part, target, stats, shard, weight[chunk], out=part.x)
    for row in range(2, 8):
        if weight[row] == 0:
            assert (part.x[row - 2] == 0).all()
            continue
        expected = form.expected(
            x[row], (ids[row], log_probs[row]), temperature=temperature[row].item()
        )
        loss = stats.divergence[row - 2] * temperature[row] ** 2
        assert_close(loss, expected[0], "loss")
        assert_close(part.x[row - 2], expected[1] * weight[row], "gradient")


@every_form
def test_the_gradient_goes_back_through_a_transform(form):
    raw, y = logits(16, 4, V)
    ids, log_probs = form.teacher(y)
    transform = LogitTransform(scale=0.7, softcap=3.0)
    leaf = raw.clone().requires_grad_()
    capped = 3.0 * torch.tanh(0.7 * leaf / 3.0)
    loss = form.naive(capped, (ids, log_probs))
    (expected,) = torch.autograd.grad(loss.sum(), leaf)
    target = SparseRows.of(
        Sparse(ids, log_probs, form.tail), kind=form.kind, vocab_size=V, dtype=torch.float64
    )
    shard, divergence = VocabShard(0, V, None, V), Divergence(form.kind, **MIXTURE)
    rows = LogitRows(transform.apply_(raw), None, None, 1.0, transform)
    stats = sparse_statistics(rows, target, divergence, shard)
    sparse_gradient(rows, target, stats, shard, torch.ones_like(loss).detach(), out=rows.x)
    assert_close(stats.divergence, loss, "loss")
    assert_close(rows.x, expected, "gradient")
