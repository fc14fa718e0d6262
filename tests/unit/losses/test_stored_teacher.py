"""What a stored teacher tells beside a loss: measured tokens, its confidence, its temperature."""

import pytest
import torch

from megatron_moe_inject.losses import (
    Sparse,
    Student,
    Vocabulary,
    measure_tokens,
    reference,
    sample_teacher,
    target_confidence,
)
from tests.harness.losses_cases import VALID, V, assert_close, logits


def _likeliest(y, k, temperature=1.0):
    """The teacher's k most likely ids, the first token having none."""
    log_probs, ids = (y / temperature).log_softmax(-1).topk(k)
    ids[0, :] = -1
    return ids, log_probs


def test_what_stored_ids_tell_is_measured_and_the_rest_is_missing():
    x, y = logits(17, 5, V)
    student = Student(x, torch.eye(V, dtype=x.dtype), torch.arange(5), Vocabulary(None, VALID))
    alone = measure_tokens(student)
    y = y[:, :VALID]
    ids, log_probs = _likeliest(y, 4)
    found = measure_tokens(student, Sparse(ids, log_probs, "bucket"))
    for name in ("loss", "top", "confidence"):
        assert torch.equal(getattr(found, name), getattr(alone, name)), name
    assert found.teacher_loss is None
    coarse = reference.sparse_divergence(x, ids, log_probs, tail="bucket", valid_vocab_size=VALID)
    assert_close(found.kl, coarse, "kl")
    assert (coarse <= reference.forward_kl(x[:, :VALID], y) + 1e-12).all()
    assert found.teacher_top.tolist() == [-1, *y.argmax(-1)[1:].tolist()]
    expected = y.softmax(-1).amax(-1).index_fill(0, torch.tensor([0]), 0)
    assert_close(found.teacher_confidence, expected, "confidence", 1e-6)
    tempered = measure_tokens(student, Sparse(*_likeliest(y, 4, 2.0), "bucket", 2.0))
    assert torch.equal(tempered.teacher_top, found.teacher_top)
    assert tempered.teacher_confidence is tempered.kl is None
    both = Sparse(*_likeliest(y, 4, 2.0), "renormalize", 2.0, log_probs, log_probs[:, :1])
    at_one = measure_tokens(student, both)
    assert torch.equal(at_one.kl, found.kl)
    assert torch.equal(at_one.teacher_confidence, found.teacher_confidence)
    assert_close(at_one.teacher_loss, -log_probs[:, 0], "teacher's loss")
    drawn = measure_tokens(student, Sparse(ids, log_probs, "sample"))
    assert drawn.teacher_top is drawn.teacher_confidence is drawn.kl is None


def test_how_sure_a_stored_teacher_is():
    _, y = logits(18, 5, V)
    ids, log_probs = _likeliest(y, 4)
    stored, unsharded = Sparse(ids, log_probs), Vocabulary()
    labels = torch.tensor([ids[1, 0], ids[1, 2], -1, y[3].argmin(), ids[4, 3]])
    p = y.softmax(-1)
    expected = torch.tensor([0.0, p[1, labels[1]], 0.0, 0.0, p[4, labels[4]]])
    found = target_confidence(stored, "label", labels, unsharded)
    assert_close(found, expected, "of the label", 1e-6)
    top = target_confidence(stored, "top", labels, unsharded)
    assert_close(top[1:], p.amax(-1)[1:], "of the most likely id", 1e-6)
    assert top[0] == 0
    drawn = Sparse(*sample_teacher(y.log_softmax(-1), 400), "sample")
    estimated = target_confidence(drawn, "label", labels.clamp(min=0), unsharded)
    own = p.gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
    assert (estimated - own).abs().max() < 0.2
    with pytest.raises(ValueError, match="drawn"):
        target_confidence(drawn, "top", labels, unsharded)
    with pytest.raises(ValueError, match=r"stored at temperature 2\.0"):
        target_confidence(Sparse(ids, log_probs, temperature=2.0), "top", labels, unsharded)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_store_has_a_temperature(temperature):
    with pytest.raises(ValueError, match="of stored log_probs must be positive and finite"):
        Sparse(torch.zeros(1, 1).long(), torch.zeros(1, 1), temperature=temperature)
