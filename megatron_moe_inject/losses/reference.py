"""Plain losses on whole logits: the meaning that every fast path of this package is tested against.

Shapes: t tokens (any leading shape), v vocabulary. ``student_logits`` and ``teacher_logits`` are
[..., v], every result is one number per token [...]. Ordinary autograd, no sharding, no chunks,
no care for memory. Give them float32 or float64.

Every divergence compares Q = softmax(student / T) with P = softmax(teacher / T) and is multiplied
by T^2, so that its gradient keeps its size when the temperature changes (Hinton et al.,
1503.02531). Ids from ``valid_vocab_size`` on are vocabulary padding and are cut off both sides,
which is the same as a logit of -inf on both. A teacher logit may be -inf: 0 log 0 counts as 0.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_moe_inject.losses.spec import LogitTransform, TokenWeighting
from megatron_moe_inject.losses.target import Mixed


def log_probs(
    logits: Tensor, temperature: float | Tensor = 1.0, valid_vocab_size: int | None = None
) -> Tensor:
    """Log-softmax of ``logits / temperature`` over the real ids; temperature a float or [...]."""
    if isinstance(temperature, Tensor):
        temperature = temperature.unsqueeze(-1)
    return torch.log_softmax(logits[..., :valid_vocab_size] / temperature, dim=-1)


def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    valid_vocab_size: int | None = None,
) -> Tensor:
    """T^2 KL(P || Q)."""
    log_q = log_probs(student_logits, temperature, valid_vocab_size)
    log_p = log_probs(teacher_logits, temperature, valid_vocab_size)
    return temperature**2 * _kl(log_p, log_q)


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    valid_vocab_size: int | None = None,
) -> Tensor:
    """T^2 KL(Q || P); +inf where the teacher excludes an id (-inf) that the student does not."""
    log_q = log_probs(student_logits, temperature, valid_vocab_size)
    log_p = log_probs(teacher_logits, temperature, valid_vocab_size)
    return temperature**2 * _kl(log_q, log_p)


def jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    valid_vocab_size: int | None = None,
    beta: float = 0.5,
) -> Tensor:
    """T^2 [beta KL(P || M) + (1-beta) KL(Q || M)], M = beta P + (1-beta) Q (GKD, 2306.13649)."""
    log_q = log_probs(student_logits, temperature, valid_vocab_size)
    log_p = log_probs(teacher_logits, temperature, valid_vocab_size)
    log_m = _log_mixture(log_p, log_q, beta)
    return temperature**2 * (beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m))


def skew_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    valid_vocab_size: int | None = None,
    alpha: float = 0.1,
) -> Tensor:
    """T^2 KL(P || alpha P + (1 - alpha) Q) (DistiLLM, 2402.03898)."""
    log_q = log_probs(student_logits, temperature, valid_vocab_size)
    log_p = log_probs(teacher_logits, temperature, valid_vocab_size)
    return temperature**2 * _kl(log_p, _log_mixture(log_p, log_q, alpha))


def cross_entropy(logits: Tensor, labels: Tensor, *, valid_vocab_size: int | None = None) -> Tensor:
    """-log softmax(logits)[label], 0 where the label is negative (ignored)."""
    picked = log_probs(logits, 1.0, valid_vocab_size).gather(-1, labels.clamp(min=0).unsqueeze(-1))
    return torch.where(labels >= 0, -picked.squeeze(-1), 0.0)


def linear_distillation(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor,
    *,
    divergence: Callable[..., Tensor] = forward_kl,
    temperature: float | Tensor = 1.0,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 0.0,
    valid_vocab_size: int | None = None,
    weighting: TokenWeighting | None = None,
    student_transform: LogitTransform | None = None,
    teacher_transform: LogitTransform | None = None,
    committee: Mixed | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(alpha factor kd + beta ce, kd, ce, factor) from hidden states and heads; see ``fused``."""
    x = transformed(student_hidden @ student_weight.t(), student_transform)
    if committee is None:
        assert teacher_hidden is not None, "a teacher or a committee"
        assert teacher_weight is not None, "a teacher or a committee"
        y = unit_y = transformed(teacher_hidden @ teacher_weight.t(), teacher_transform)
    else:
        teachers = [transformed(m.hidden @ m.head.t(), m.transform) for m in committee.dense]
        mixed = functools.partial(
            mixture, teachers, committee.weights, labels,
            by=committee.by, valid_vocab_size=valid_vocab_size,
        )  # fmt: skip
        unit_y, y = mixed(temperature=1.0), mixed(temperature=temperature)
        y = y * (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    kd = divergence(x, y, temperature=temperature, valid_vocab_size=valid_vocab_size)
    ce = cross_entropy(x, labels, valid_vocab_size=valid_vocab_size)
    factor = torch.ones_like(kd)
    if weighting is not None:
        factor = distillation_factor(
            x, unit_y, labels, weighting, valid_vocab_size=valid_vocab_size
        )
    return alpha * factor * kd + beta * ce, kd, ce, factor


def aligned(
    student_logits: Tensor,
    labels: Tensor,
    chunks: Sequence[Sequence[int]],
    log_probs: Sequence[float],
    *,
    divergence: Callable[..., Tensor] = forward_kl,
    temperature: float = 1.0,
    valid_vocab_size: int | None = None,
) -> Tensor:
    """Per label, T D of its chunk's two outcomes divided by the chunk's labels; see ``aligned``.

    Args:
        student_logits, labels: [t, v] and [t].
        chunks: of each chunk, which of the t labels it has.
        log_probs: the teacher's of each chunk.
    """
    of_label = -cross_entropy(student_logits, labels, valid_vocab_size=valid_vocab_size)
    losses = torch.zeros_like(of_label)
    for members, log_p in zip(chunks, log_probs, strict=True):
        both = torch.stack([of_label[list(members)].sum(), of_label.new_tensor(log_p)])
        q, p = torch.stack([both / temperature, (-(both / temperature).exp()).log1p()], dim=1)
        loss = temperature * divergence(q, p) / len(members)
        losses = losses.index_put((torch.tensor(members),), loss)
    return losses


def mixture(
    teachers: Sequence[Tensor],
    weights: Sequence[float],
    labels: Tensor,
    temperature: float | Tensor,
    *,
    by: str = "fixed",
    valid_vocab_size: int | None = None,
) -> Tensor:
    """log sum_k w_k softmax(z_k / T) of the real ids, the weights by token; see ``committee``."""
    shares = []
    for logits, weight in zip(teachers, weights, strict=True):
        confidence = torch.ones_like(logits[..., 0])
        if by == "label":  # a label that is ignored has cross-entropy 0: all alike
            confidence = (-cross_entropy(logits, labels, valid_vocab_size=valid_vocab_size)).exp()
        if by == "top":
            confidence = log_probs(logits, 1.0, valid_vocab_size).exp().amax(-1)
        shares.append(weight * confidence)
    total = functools.reduce(torch.add, shares)
    probs = (log_probs(logits, temperature, valid_vocab_size).exp() for logits in teachers)
    parts = ((w / total)[..., None] * p for w, p in zip(shares, probs, strict=True))
    return functools.reduce(torch.add, parts).log()


def transformed(logits: Tensor, transform: LogitTransform | None) -> Tensor:
    """softcap tanh(scale logits / softcap), -inf where excluded; see ``spec.LogitTransform``."""
    if transform is None:
        return logits
    logits = transform.scale * logits
    cap = transform.softcap
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    if transform.excluded is None:
        return logits
    return logits.index_fill(-1, transform.excluded, -torch.inf)


@torch.no_grad()
def distillation_factor(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    weighting: TokenWeighting,
    *,
    valid_vocab_size: int | None = None,
) -> Tensor:
    """How much of its distillation each token keeps, see ``spec.TokenWeighting``."""
    log_p = log_probs(teacher_logits, 1.0, valid_vocab_size)
    teacher_ce = cross_entropy(teacher_logits, labels, valid_vocab_size=valid_vocab_size)
    factor = torch.ones_like(teacher_ce)
    if weighting.confidence == "label":
        factor = torch.where(labels >= 0, (-teacher_ce).exp(), 0.0)
    if weighting.confidence == "entropy":
        factor = 1 + torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1) / math.log(
            max(log_p.shape[-1], 2)
        )
    if weighting.skip_worse:
        student_ce = cross_entropy(student_logits, labels, valid_vocab_size=valid_vocab_size)
        factor = torch.where(teacher_ce > student_ce, 0.0, factor)
    return factor


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    gap = torch.where(log_a == -torch.inf, 0.0, log_a - log_b)
    return (log_a.exp() * gap).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    log_weights = torch.tensor([weight, 1 - weight], dtype=torch.float64).log().tolist()
    return torch.logaddexp(log_p + log_weights[0], log_q + log_weights[1])


def sparse_divergence(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    *,
    kind: str = "forward_kl",
    tail: str = "renormalize",
    temperature: float | Tensor = 1.0,
    valid_vocab_size: int | None = None,
    beta: float = 0.5,
    skew: float = 0.1,
) -> Tensor:
    """T^2 times a divergence from k teacher ids [..., k] and their log-probabilities at T.

    A negative id or a log-probability of -inf is an unused slot. See ``sparse`` for the
    tails; in reverse KL a bucket has at least the probability 2^-24.
    """
    log_q = log_probs(student_logits, temperature, valid_vocab_size)
    used = (teacher_ids >= 0) & (teacher_log_probs > -torch.inf)
    ids = teacher_ids.where(used, 0)
    log_q_ids = log_q.gather(-1, ids)
    if tail == "sample":
        weights = torch.where(used, teacher_log_probs.exp(), 0.0)
        return -(temperature**2) * (weights * log_q_ids).sum(-1)
    log_p = torch.where(used, teacher_log_probs, -torch.inf)
    in_s = torch.zeros_like(log_q).scatter_add(-1, ids, used.to(log_q.dtype)) > 0
    rest = (~in_s).any(-1, keepdim=True)
    left = 1 - log_p.exp().sum(-1, keepdim=True)
    p_rest = left.clamp(min=2.0**-24 if kind == "reverse_kl" else 0)
    p_rest = torch.where(rest, p_rest, 0.0) if tail == "bucket" else torch.zeros_like(left)
    scaled = log_p.log_softmax(-1) + (1 - p_rest).log()
    log_p = torch.cat((log_p.where(p_rest == left, scaled), p_rest.log()), -1)
    # An outcome that does not exist is equally likely, log 1, on both sides and adds nothing.
    exists = torch.cat((used, rest), -1) & used.any(-1, keepdim=True)
    log_q_rest = log_q.masked_fill(in_s, -torch.inf).logsumexp(-1, keepdim=True)
    log_q = torch.where(exists, torch.cat((log_q_ids, log_q_rest), -1), 0.0)
    log_p = torch.where(exists, log_p, 0.0)
    if kind == "forward_kl":
        return temperature**2 * _kl(log_p, log_q)
    if kind == "reverse_kl":
        return temperature**2 * _kl(log_q, log_p)
    log_m = _log_mixture(log_p, log_q, beta if kind == "jsd" else skew)
    if kind == "jsd":
        return temperature**2 * (beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m))
    return temperature**2 * _kl(log_p, log_m)


@torch.no_grad()
def measures(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    valid_vocab_size: int | None = None,
) -> dict[str, Tensor]:
    """What ``measure.TokenMeasures`` says of each token, by name; without a teacher only a half."""
    log_q = log_probs(student_logits, 1.0, valid_vocab_size)
    values = {
        "loss": cross_entropy(student_logits, labels, valid_vocab_size=valid_vocab_size),
        "top": log_q.argmax(-1),
        "confidence": log_q.exp().amax(-1),
    }
    if teacher_logits is None:
        return values
    log_p = log_probs(teacher_logits, 1.0, valid_vocab_size)
    teacher_loss = cross_entropy(teacher_logits, labels, valid_vocab_size=valid_vocab_size)
    return values | {
        "teacher_loss": teacher_loss,
        "teacher_top": log_p.argmax(-1),
        "kl": _kl(log_p, log_q),
        "teacher_confidence": log_p.exp().amax(-1),
    }


def feature_loss(student: Tensor, teacher: Tensor, *, kind: str) -> Tensor:
    """Distance of projected student states from teacher states [..., h_t]; see ``features``."""
    if kind == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
    error = (student - teacher) ** 2
    if kind == "mse":
        return error.mean(-1)
    return error.sum(-1) / (teacher**2).sum(-1)
