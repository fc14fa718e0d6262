"""Shares of teacher work by stage: the best there are, and no clock in what a teacher says."""

import itertools
import random

import pytest

from megatron_moe_inject.teachers.spread import (
    MAX_SEQUENCES,
    PASS_TOKENS,
    UNKNOWN,
    Loads,
    pass_size,
    sequences_by_stage,
    shares,
)


def delay(parts, ratio, busy=None):
    """How much later the schedule begins than without teachers, in forwards of a stage."""
    busy = busy or [0.0] * len(parts)
    both = zip(parts, busy, strict=True)
    return max(0.0, *(before + ratio * part - i for i, (part, before) in enumerate(both)))


def all_shares(count, stages):
    for cuts in itertools.combinations_with_replacement(range(count + 1), stages - 1):
        bounds = (0, *cuts, count)
        yield [b - a for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("seed", range(60))
def test_no_other_shares_begin_earlier(seed):
    draw = random.Random(seed)
    count, stages = draw.randint(0, 7), draw.randint(2, 4)
    ratio = draw.choice([0.1, 0.5, 1.0, 2.1, 7.0])
    busy = [draw.choice([0.0, 0.5, 3.0]) for _ in range(stages)] if seed % 2 else None
    parts = shares(count, stages, ratio, busy)
    assert sum(parts) == count
    assert min(parts) >= 0
    best = min(delay(other, ratio, busy) for other in all_shares(count, stages))
    assert delay(parts, ratio, busy) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(20))
def test_later_stages_take_more_and_one_pass_more_takes_nothing_away(seed):
    draw = random.Random(seed)
    count, stages, ratio = draw.randint(0, 300), draw.randint(1, 16), draw.uniform(0.01, 9)
    parts = shares(count, stages, ratio)
    assert parts == sorted(parts)
    more = shares(count + 1, stages, ratio)
    assert sum(b - a for a, b in zip(parts, more, strict=True)) == 1
    assert all(b >= a for a, b in zip(parts, more, strict=True))


def test_shares_are_even_as_long_as_nothing_is_measured_and_one_stage_takes_all():
    assert shares(10, 4) == [2, 2, 3, 3]
    assert shares(3, 4) == [0, 1, 1, 1]
    assert shares(5, 1, 0.3) == [5]
    assert shares(0, 3, 0.3) == [0, 0, 0]


def test_what_fits_into_the_wait_of_the_last_stages_costs_nothing():
    """16 stages, a teacher's sequence takes two forwards of a stage."""
    parts = shares(29, 16, 2.0)
    assert delay(parts, 2.0) == 0
    assert delay([0] * 15 + [29], 2.0) == 2.0 * 29 - 15


@pytest.mark.parametrize("count", [0, 1, 3, 8, 29, 128])
@pytest.mark.parametrize("length", [32, 1024, 2048, 8192])
def test_passes_hold_few_sequences_so_that_even_shares_are_even(count, length):
    for stages in (1, 2, 4, 16):
        size = pass_size(count, stages, length)
        assert 1 <= size <= MAX_SEQUENCES
        assert size == 1 or size * length <= PASS_TOKENS
        assert max(sequences_by_stage(count, stages, length)) < -(-count // stages) + size


@pytest.mark.parametrize("seed", range(20))
def test_stages_cut_the_same_passes_whatever_the_ratio_is(seed):
    """So that what a teacher says of a sequence does not depend on who runs it."""
    draw = random.Random(seed)
    count, stages = draw.randint(1, 60), draw.randint(1, 8)
    size = pass_size(count, stages, 512)
    passes = {(i, min(i + size, count)) for i in range(0, count, size)}
    for ratio in (UNKNOWN, 0.01, 0.4, 3.0, 50.0):
        parts = sequences_by_stage(count, stages, 512, ratio)
        assert sum(parts) == count
        cut, begin = set(), 0
        for part in parts:
            end = begin + part
            cut |= {(i, min(i + size, end)) for i in range(begin, end, size)}
            begin = end
        assert cut == passes


def test_a_second_teacher_goes_where_the_first_left_room():
    loads = Loads(2)
    assert loads.share(2, 8192, 1.0) == [0, 2]
    assert loads.share(2, 8192, 1.0) == [1, 1]
    loads.begin()
    assert loads.share(1, 8192, 0.5) == [0, 1]
    assert loads.head_starts(0.5) == [1.0, 0.0]
    assert Loads(3).head_starts(UNKNOWN) == [0.0, 0.0, 0.0]
