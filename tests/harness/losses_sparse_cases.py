"""Stored teachers for the tests of the sparse losses.

Shapes: k slots per token, v vocabulary, last among any others.
"""

import torch
from torch import Tensor

from tests.harness.losses_cases import KINDS

# Every tail treatment with every kind that it allows.
TAIL_KINDS = [("renormalize", "forward_kl"), ("sample", "forward_kl")] + [
    ("bucket", kind) for kind in KINDS
]


def store(
    teacher_logits: Tensor, k: int, temperature=1.0, *, valid=None, seed=0, unused=True
) -> tuple[Tensor, Tensor]:
    """k different ids of every token, of any probability, and their log-probabilities.

    With ``unused`` some slots are not used, in both ways, and the first token has none at all.
    """
    generator = torch.Generator().manual_seed(seed)
    log_probs = (teacher_logits[..., :valid] / temperature).log_softmax(-1)
    ids = torch.rand(log_probs.shape, generator=generator).argsort(-1)[..., :k]
    log_probs = log_probs.gather(-1, ids)
    if unused:
        empty = torch.rand(ids.shape, generator=generator)
        ids[empty < 0.15] = -1
        log_probs[empty > 0.85] = -torch.inf
        ids.view(-1, k)[0] = -100
    return ids, log_probs


def sampled(teacher_logits: Tensor, k: int, *, valid=None, seed=0) -> tuple[Tensor, Tensor]:
    """k ids of every token, drawn uniformly, so that many repeat, and any weights."""
    generator = torch.Generator().manual_seed(seed)
    width = teacher_logits[..., :valid].shape[-1]
    ids = torch.randint(0, width, (*teacher_logits.shape[:-1], k), generator=generator)
    log_probs = teacher_logits[..., :valid].log_softmax(-1).gather(-1, ids)
    ids.view(-1, k)[0] = -100
    ids[..., 0] = -1
    return ids, log_probs


def stored_for(tail: str, teacher_logits: Tensor, k: int, temperature=1.0, **options):
    """What a store for this tail treatment may hold."""
    if tail == "sample":
        return sampled(teacher_logits, k, **options)
    return store(teacher_logits, k, temperature, **options)
