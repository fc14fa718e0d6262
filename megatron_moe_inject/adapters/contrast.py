"""Which ids of a vocabulary a body of text uses more than another: the rows worth training."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from megatron_moe_inject.host.errors import RecipeError

MOST_TOKENS = 50_000_000
"""Of a body of text that are counted, from documents evenly over its files."""

_AT_ONCE = 1 << 20
"""Tokens of one count."""


def count_ids(prefixes: Iterable[str], size: int, share: float = 1.0) -> np.ndarray:
    """How often each id occurs in Megatron's indexed datasets.

    Args:
        prefixes: of the ``.bin`` and ``.idx`` files.
        size: of the vocabulary; ids beyond are not counted.
        share: of each file's documents, its first, that are looked at.

    Returns:
        ``[size]`` int64.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    counts = np.zeros(size, dtype=np.int64)
    waiting: list[np.ndarray] = []
    prefixes, held = list(prefixes), 0

    def count() -> None:
        ids = np.concatenate([*waiting, np.zeros(0, np.int64)])
        ids = ids[(ids >= 0) & (ids < size)].astype(np.int64)
        counts[:] += np.bincount(ids, minlength=size)
        waiting.clear()

    for prefix in prefixes:
        dataset = IndexedDataset(prefix)
        lengths = dataset.sequence_lengths[: max(1, math.ceil(len(dataset) * share))]
        step = max(1, math.ceil(int(lengths.sum()) * len(prefixes) / MOST_TOKENS))
        for document in range(0, len(lengths), step):
            waiting.append(np.array(dataset[document]).ravel())  # a view dies with its file
            held += len(waiting[-1])
            if held >= _AT_ONCE:  # a count goes over the whole vocabulary
                count()
                held = 0
    count()
    return counts


def contrast(domain: np.ndarray, general: np.ndarray) -> np.ndarray:
    """p log(p / q) of each id, in nats: its part of KL(domain || general).

    Args:
        domain, general: counts ``[size]``; half a count is added to each, so that an id which one
            of them lacks has a probability.
    """
    p, q = (counts + 0.5 for counts in (domain, general))
    p, q = p / p.sum(), q / q.sum()
    return np.where(domain > 0, p * np.log(p / q), -np.inf)


def chosen(scores: np.ndarray, *, budget: float | None, threshold: float | None) -> list[int]:
    """Ids of the largest positive scores, rising.

    Args:
        scores: ``[size]``, see ``contrast``.
        budget: at most so large a share of all ids.
        threshold: or the fewest that make up this share of the sum of positive scores.

    Raises:
        RecipeError: no score is positive, or the budget is less than one id.
    """
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] > 0]
    if budget is not None:
        order = order[: int(budget * len(scores))]
    elif threshold is not None:
        sums = np.cumsum(scores[order])
        if len(sums):
            order = order[: int(np.searchsorted(sums, threshold * sums[-1] * (1 - 1e-12))) + 1]
    if not len(order):
        raise RecipeError(
            f"train.vocabulary_rows: of {len(scores)} ids none is chosen; raise the budget, or "
            "name a domain whose text differs from the general text"
        )
    return sorted(order.tolist())
