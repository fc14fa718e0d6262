"""Intervals for the difference between two models on the same sequences.

Both models read the same text, so sequences are drawn, not models: a resample takes n of the n
sequences with replacement, and the same ones for both. What is hard for both cancels, and the
interval is that of the difference. Percentile intervals (Efron), by sequence because tokens of one
sequence are not independent; sequences cut from one document are taken to be.

Shapes: n sequences, R resamples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
SEED = 1
_BLOCK = 1 << 22
"""Counts that are held at once."""


class Interval(NamedTuple):
    """An estimate and the interval around it."""

    value: float
    low: float
    high: float


def paired_difference(
    before: np.ndarray,
    after: np.ndarray,
    weights: np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """Interval of sum(after) / sum(weights) - sum(before) / sum(weights).

    Args:
        before, after: ``[n]`` sums of each sequence under either model.
        weights: ``[n]`` what they are divided by in total, such as tokens.

    With a single sequence there is nothing to resample: the interval is the estimate.
    """
    assert before.shape == after.shape == weights.shape
    assert weights.sum() > 0
    difference = after - before
    n = len(difference)
    generator = np.random.default_rng(seed)
    means, block = [], max(1, _BLOCK // n)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        counts = generator.multinomial(n, np.full(n, 1 / n), size=rows).astype(np.float64)
        total = counts @ weights
        means.append((counts @ difference)[total > 0] / total[total > 0])
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return Interval(float(difference.sum() / weights.sum()), float(low), float(high))
