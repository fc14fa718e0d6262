"""Whole samples from shares: how many of each part a batch gets, and in which order.

Counts come from error diffusion: each batch gives every part what it is owed so far, rounded down,
and the samples that are left go to those that are owed most. What a part was given therefore stays
beside what its shares sum up to, for as long as the run lasts, and needs no random numbers. Shares
are whole billionths, so that everything here is integer arithmetic: the same on every rank and
machine, and exact after any number of batches.

Shapes: I iterations, C parts (classes of data, or entries of a blend), B samples of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

UNIT = 10**9
"""The share of a whole batch."""


def to_units(shares: np.ndarray) -> np.ndarray:
    """Shares ``[I, C]``, each row with a positive sum, as int64 that sum to ``UNIT`` in each row.

    Each is within a unit of its share, and a share of 0 stays 0.
    """
    shares = np.asarray(shares, dtype=np.float64)
    ends = np.rint(np.cumsum(shares, axis=1) * (UNIT / shares.sum(axis=1, keepdims=True)))
    ends = ends.astype(np.int64)
    last = shares.shape[1] - 1 - np.argmax(shares[:, ::-1] > 0, axis=1)  # part with a share
    ends = np.where(np.arange(shares.shape[1]) >= last[:, None], UNIT, ends)
    return np.diff(ends, axis=1, prepend=0)


def diffuse(sizes: Sequence[int] | np.ndarray, units: np.ndarray) -> np.ndarray:
    """How many samples of each part every batch gets, ``[I, C]`` int64.

    Args:
        sizes: B of each of the I batches.
        units: shares ``[I, C]`` as ``to_units`` gives them.

    Returns:
        Counts of at least 0 that sum to the batch's size in each row. The sum of a part's counts
        over any first batches differs from that of its shares by at most 1/2 with two parts and by
        less than 1 with three. With more it is less than 1 wherever every part is due a sample or
        more in each batch; where several are due less, it can be a little more (a search for bad
        cases found 1.06 with four parts and 1.25 with eight).
    """
    samples = np.zeros(units.shape, dtype=np.int64)
    parts = range(units.shape[1])
    owed = [0] * len(parts)
    for row, size, shares in zip(samples, map(int, sizes), units.tolist(), strict=True):
        owed = [debt + size * share for debt, share in zip(owed, shares, strict=True)]
        counts = [max(0, debt // UNIT) for debt in owed]
        owed = [debt - count * UNIT for debt, count in zip(owed, counts, strict=True)]
        left = size - sum(counts)
        while left:
            step = 1 if left > 0 else -1
            able = parts if left > 0 else [part for part in parts if counts[part]]
            part = max(able, key=lambda i: step * owed[i])
            counts[part] += step
            owed[part] -= step * UNIT
            left -= step
        row[:] = counts
    return samples


def diffuse_pairs(sizes: Sequence[int] | np.ndarray, shares: np.ndarray) -> np.ndarray:
    """How many pairs every batch gets, ``[I]`` int64: two samples each, both in one batch.

    Args:
        sizes: B of each of the I batches.
        shares: of the samples of a batch that are of pairs, ``[I]`` in units.

    Returns:
        Counts of at most B // 2. Over any first batches their samples differ from the shares' sum
        by at most one, but where batches cannot hold what is due: one of a single sample holds no
        pair, one of three holds one. Later batches make up for it.
    """
    pairs = np.zeros(len(shares), dtype=np.int64)
    owed = 0
    for i, (size, share) in enumerate(zip(map(int, sizes), shares.tolist(), strict=True)):
        owed += size * share
        pairs[i] = min(max(0, (owed + UNIT) // (2 * UNIT)), size // 2)
        owed -= 2 * UNIT * int(pairs[i])
    return pairs


def spread(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """An order of a batch in which each part is spread evenly: the part of each place, ``[B]``.

    The k-th of n samples stands at (k + phase) / n of the way, with a phase of each part's own, so
    that rare parts do not meet at one place. So any stretch of the batch has close to the batch's
    own shares.
    """
    sizes = np.asarray(counts)
    parts = np.repeat(np.arange(len(sizes)), sizes)
    ordinals = np.arange(len(parts)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    phases = (np.arange(len(sizes)) + 0.5) / len(sizes)
    way = (ordinals + phases[parts]) / sizes[parts]
    return parts[np.argsort(way, kind="stable")]


def dealt(place: int, size: int, micro_batch_size: int, lanes: int) -> int:
    """Which sample of an evenly spread batch Megatron is given at a place of its own order.

    Megatron deals a batch to its data-parallel ranks by micro-batches in turn, which would beat
    with the period of the spread: of two classes with equal shares, one rank would get only the
    first. So each rank is dealt one stretch of the batch. The micro-batches themselves are the same
    whatever the number of ranks.

    Args:
        place: 0 to ``size`` - 1.
        size: B. One that these ranks cannot take, as an earlier phase of a run on fewer ranks may
            have had, is left in order.
        lanes: data-parallel ranks.
    """
    if size % (micro_batch_size * lanes):
        return place
    step, rest = divmod(place, micro_batch_size * lanes)
    lane, offset = divmod(rest, micro_batch_size)
    return lane * (size // lanes) + step * micro_batch_size + offset
