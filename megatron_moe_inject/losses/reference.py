"""Plain losses on whole logits: the meaning that every fast path of this package is tested against.

Shapes: t tokens (any leading shape), v vocabulary. ``student_logits`` and ``teacher_logits`` are
[..., v], every result is one number per token [...]. Ordinary autograd, no sharding, no chunks,
no care for memory. Give them float32 or float64.

Every divergence compares Q = softmax(student / T) with P = softmax(teacher / T) and is multiplied
by T^2, so that its gradient keeps its size when the temperature changes (Hinton et al.,
1503.02531). Ids from ``valid_vocab_size`` on are vocabulary padding and are cut off both sides,
which is the same as a logit of -inf on both. A teacher logit may be -inf: 0 log 0 counts as 0.
"""

import torch
from torch import Tensor


def log_probs(
    logits: Tensor, temperature: float | Tensor = 1.0, valid_vocab_size: int | None = None
) -> Tensor:
    """Log-softmax of ``logits / temperature`` over the real ids; temperature a float or [...]."""
    if isinstance(temperature, Tensor):
        temperature = temperature.unsqueeze(-1)
    return torch.log_softmax(logits[..., :valid_vocab_size] / temperature, dim=-1)


def forward_kl(student_logits, teacher_logits, *, temperature=1.0, valid_vocab_size=None) -> Tensor:
    """T^2 KL(P || Q)."""
    log_q = log_probs(student_logits, temperature, valid_vocab_size)
    log_p = log_probs(teacher_logits, temperature, valid_vocab_size)
    return temperature**2 * _kl(log_p, log_q)


def reverse_kl(student_logits, teacher_logits, *, temperature=1.0, valid_vocab_size=None) -> Tensor:
    """T^2 KL(Q || P); +inf where the teacher excludes an id (-inf) that the student does not."""
    log_q = log_probs(student_logits, temperature, valid_vocab_size)
    log_p = log_probs(teacher_logits, temperature, valid_vocab_size)
    return temperature**2 * _kl(log_q, log_p)


def jsd(
    student_logits, teacher_logits, *, temperature=1.0, valid_vocab_size=None, beta=0.5
) -> Tensor:
    """T^2 [beta KL(P || M) + (1-beta) KL(Q || M)], M = beta P + (1-beta) Q (GKD, 2306.13649)."""
    log_q = log_probs(student_logits, temperature, valid_vocab_size)
    log_p = log_probs(teacher_logits, temperature, valid_vocab_size)
    log_m = _log_mixture(log_p, log_q, beta)
    return temperature**2 * (beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m))


def skew_kl(
    student_logits, teacher_logits, *, temperature=1.0, valid_vocab_size=None, alpha=0.1
) -> Tensor:
    """T^2 KL(P || alpha P + (1 - alpha) Q) (DistiLLM, 2402.03898)."""
    log_q = log_probs(student_logits, temperature, valid_vocab_size)
    log_p = log_probs(teacher_logits, temperature, valid_vocab_size)
    return temperature**2 * _kl(log_p, _log_mixture(log_p, log_q, alpha))


def cross_entropy(logits: Tensor, labels: Tensor, *, valid_vocab_size=None) -> Tensor:
    """-log softmax(logits)[label], 0 where the label is negative (ignored)."""
    picked = log_probs(logits, 1.0, valid_vocab_size).gather(-1, labels.clamp(min=0).unsqueeze(-1))
    return torch.where(labels >= 0, -picked.squeeze(-1), 0.0)


def linear_distillation(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    labels,
    *,
    divergence=forward_kl,
    temperature=1.0,
    alpha=1.0,
    beta=0.0,
    valid_vocab_size=None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(alpha kd + beta ce, kd, ce) from hidden states and whole heads; see ``fused``."""
    x, y = student_hidden @ student_weight.t(), teacher_hidden @ teacher_weight.t()
    kd = divergence(x, y, temperature=temperature, valid_vocab_size=valid_vocab_size)
    ce = cross_entropy(x, labels, valid_vocab_size=valid_vocab_size)
    return alpha * kd + beta * ce, kd, ce


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    gap = torch.where(log_a == -torch.inf, 0.0, log_a - log_b)
    return (log_a.exp() * gap).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    log_weights = torch.tensor([weight, 1 - weight], dtype=torch.float64).log().tolist()
    return torch.logaddexp(log_p + log_weights[0], log_q + log_weights[1])
