"""Whole samples from shares: how many, and in which order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe_inject.data.apportion import (
    UNIT,
    dealt,
    diffuse,
    diffuse_pairs,
    spread,
    to_units,
)


@st.composite
def runs(draw, least=1, most=6):
    """Batch sizes ``[I]``, and shares ``[I, C]`` of which some are 0."""
    parts, length = draw(st.integers(least, most)), draw(st.integers(1, 30))
    sizes = draw(st.lists(st.integers(1, 24), min_size=length, max_size=length))
    one = st.one_of(st.just(0.0), st.floats(0.001, 1), st.sampled_from([0.25, 0.5, 1.0]))
    row = st.lists(one, min_size=parts, max_size=parts).filter(any)
    shares = np.array(draw(st.lists(row, min_size=length, max_size=length)))
    return sizes, shares / shares.sum(axis=1, keepdims=True)


@given(runs())
def test_units_sum_to_one_and_nothing_stays_nothing(run):
    _, shares = run
    units = to_units(shares)
    assert (units.sum(axis=1) == UNIT).all()
    assert np.abs(units / UNIT - shares).max() <= 1.5 / UNIT
    assert (units[shares == 0] == 0).all()
    assert units.min() >= 0


@given(runs())
def test_counts_fill_their_batches_and_stay_beside_the_shares(run):
    sizes, shares = run
    units = to_units(shares)
    counts = diffuse(sizes, units)
    assert counts.min() >= 0
    assert counts.sum(axis=1).tolist() == sizes
    due = np.array(sizes)[:, None] * units
    astray = np.abs(np.cumsum(counts, axis=0) * UNIT - np.cumsum(due, axis=0)).max()
    parts = shares.shape[1]
    if parts == 2:
        assert astray <= UNIT / 2
    elif parts == 3 or due.min() >= UNIT:
        assert astray < UNIT
    else:
        assert astray < 2 * UNIT


@given(runs(least=2, most=2))
def test_pairs_are_whole_and_stay_beside_their_share(run):
    """In odd batches, too, where they can hold what is due."""
    sizes, shares = run
    own = np.minimum(shares[:, :1], 0.66)  # a batch of three can have that
    units = to_units(np.concatenate([own, 1 - own], axis=1))
    sizes = [size + (size == 1) for size in sizes]
    pairs = diffuse_pairs(sizes, units[:, 0])
    assert (pairs >= 0).all()
    assert (pairs <= np.array(sizes) // 2).all()
    due = np.cumsum(np.array(sizes) * units[:, 0])
    assert np.abs(np.cumsum(2 * pairs) * UNIT - due).max() <= UNIT


def test_pairs_of_batches_that_hold_none_come_later():
    assert diffuse_pairs([1, 1, 1, 4], np.array([UNIT // 2] * 4)).tolist() == [0, 0, 0, 2]
    assert diffuse_pairs([3, 3, 3, 3], np.array([UNIT // 2] * 4)).tolist() == [1, 1, 0, 1]


def test_parts_that_are_owed_more_than_a_small_batch_has_wait():
    """Two get the first batch's halves, and the other two are owed a sample each of one."""
    halves = [0, 0, UNIT // 2, UNIT // 2]
    counts = diffuse([2, 1, 1], np.array([[UNIT // 4] * 4, halves, halves]))
    assert counts[0].tolist() == [1, 1, 0, 0]
    assert sorted(counts[1].tolist()) == [0, 0, 0, 1]
    assert sorted(counts[2].tolist()) == [0, 0, 0, 1]
    assert counts[1].tolist() != counts[2].tolist()


@given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 60))
def test_a_constant_share_is_reached_as_exactly_as_whole_samples_can(size, part, length):
    share = min(part / 40, 1.0)
    units = to_units(np.tile([[share, 1 - share]], (length, 1)))
    counts = diffuse([size] * length, units)
    assert abs(counts[:, 0].sum() - share * size * length) <= 0.5 + 1e-6


@given(st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any))
def test_an_order_has_the_counts_and_is_even_at_every_place(counts):
    order = spread(counts)
    assert np.bincount(order, minlength=len(counts)).tolist() == counts
    way = np.arange(1, len(order) + 1) / len(order)
    for part, count in enumerate(counts):
        assert np.abs(np.cumsum(order == part) - way * count).max() < max(1, len(counts) / 2)


def test_rare_parts_stand_apart():
    assert spread([5, 1, 1, 1]).tolist() == [0, 0, 1, 0, 0, 2, 0, 3]


@given(
    st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3, 8]), st.integers(1, 6), st.integers(0, 99)
)
def test_ranks_and_micro_batches_get_alike_mixtures(micro, lanes, steps, percent):
    size = micro * lanes * steps
    order = spread([size * percent // 100, size - size * percent // 100])
    at = [dealt(place, size, micro, lanes) for place in range(size)]
    assert sorted(at) == list(range(size))
    given_out = (order[at] == 0).reshape(steps, lanes, micro)
    share = (order == 0).mean()
    assert np.abs(given_out.sum(axis=2) - micro * share).max() < 1
    assert np.abs(given_out.sum(axis=(0, 2)) - micro * steps * share).max() < 1
    alone = [dealt(place, size, micro, 1) for place in range(size)]
    groups = {tuple(at[i : i + micro]) for i in range(0, size, micro)}
    assert groups == {tuple(alone[i : i + micro]) for i in range(0, size, micro)}


def test_a_batch_that_the_ranks_cannot_take_stays_in_order():
    assert [dealt(place, 6, 2, 2) for place in range(6)] == list(range(6))
    assert [dealt(place, 8, 1, 2) for place in range(8)] == [0, 4, 1, 5, 2, 6, 3, 7]


def test_a_part_without_a_share_anywhere_gets_nothing():
    counts = diffuse([5] * 9, to_units(np.tile([[0.0, 0.6, 0.4, 0.0]], (9, 1))))
    assert counts.sum(axis=0).tolist() == [0, 27, 18, 0]
    assert counts[:5].sum(axis=0) == pytest.approx([0, 15, 10, 0])
