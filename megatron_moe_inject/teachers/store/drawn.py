"""Ids drawn from a teacher for a store: the same ones whoever writes it, and in which order.

The k draws of a token are one from each of k equal parts of the teacher's cumulated probabilities.
Each id is drawn k P times in expectation, as by k independent draws, so that the loss and its
gradient, which are linear in the draws, are unbiased; their variance is at most that of independent
ones. What is random follows from the data set, the token's place in it and the draw's number
(SplitMix64, Steele et al. 2014), not from a generator that goes on.

Shapes: t tokens, n draws of each, v vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_moe_inject.teachers.store.row_format import Rows

_STEP = np.uint64(0x9E3779B97F4A7C15)


def uniforms(data: int, places: np.ndarray, draws: int) -> np.ndarray:
    """Numbers in [0, 1), float64 [t, n], that follow from their arguments.

    Args:
        data: position of the data set in the store.
        places: [t] of the tokens in its ``.bin`` file.
        draws: n.
    """
    with np.errstate(over="ignore"):
        start = _mixed(_mixed(np.array([data], np.uint64) + _STEP) ^ places.astype(np.uint64))
        numbers = _mixed(start[:, None] + _STEP * np.arange(1, draws + 1, dtype=np.uint64))
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def drawn_rows(
    tokens: Tensor,
    log_probs: Tensor,
    *,
    temperature: float,
    random: Tensor,
    labels: Tensor | None = None,
) -> Rows:
    """Ids drawn from each token's distribution at a temperature, ascending.

    Args:
        tokens: [t] ids that were read.
        log_probs: [t, v] float32 at temperature 1.
        temperature: that they are drawn at.
        random: [t, n] float64 of ``uniforms``.
        labels: see ``top_rows``.

    Returns:
        Rows of at most n ids, with the log of the share of draws that each is.
    """
    draws = random.shape[1]
    cumulated = (log_probs / temperature).softmax(-1).double().cumsum_(-1)
    parts = (torch.arange(draws, device=random.device) + random) / draws
    ids = torch.searchsorted(cumulated, parts * cumulated[:, -1:], right=True)
    # Rounding may point behind the last id with a probability.
    last = torch.searchsorted(cumulated, cumulated[:, -1:])
    ids = torch.minimum(ids, last)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slot = first.long().cumsum(-1) - 1
    times = torch.zeros_like(ids).scatter_add_(1, slot, torch.ones_like(ids))
    unique = torch.full_like(ids, -1).scatter_(1, slot, ids)
    most = min(draws, log_probs.shape[1])
    return Rows(
        tokens,
        unique[:, :most],
        (times[:, :most].float() / draws).log(),
        log_probs.new_zeros(len(tokens), 0),
        None if labels is None else log_probs.gather(1, labels[:, None]).squeeze(1),
    )
