"""Paired bootstrap intervals: what they cover, and that pairing is what makes them narrow."""

import numpy as np
import pytest

from megatron_moe_inject.evaluation.bootstrap import paired_difference


def drawn(generator, n, effect):
    """Losses of n sequences before and after; hard ones are hard for both."""
    tokens = generator.integers(16, 64, n).astype(float)
    hard = generator.normal(3, 1, n)
    noise = generator.normal(effect, 0.2, n)
    return hard * tokens, (hard + noise) * tokens, tokens


@pytest.mark.parametrize("effect", [0.0, -0.3])
def test_95_percent_of_the_intervals_hold_the_truth(effect):
    generator = np.random.default_rng(3)
    held, trials = 0, 400
    for _ in range(trials):
        found = paired_difference(*drawn(generator, 60, effect), resamples=400)
        held += found.low <= effect <= found.high
    # Three standard errors of a binomial at 0.95, and the little that percentiles fall short.
    assert 0.91 <= held / trials <= 0.985


def test_the_width_is_that_of_the_differences():
    before, after, tokens = drawn(np.random.default_rng(0), 4000, -0.1)
    found = paired_difference(before, after, tokens)
    per_token = (after - before) / tokens
    error = np.sqrt((tokens**2 * (per_token - found.value) ** 2).sum()) / tokens.sum()
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert found.value == pytest.approx((after - before).sum() / tokens.sum())
    shuffled = np.random.default_rng(1).permutation(4000)
    apart = paired_difference(before, after[shuffled], tokens)
    assert apart.high - apart.low > 3 * (found.high - found.low)


def test_the_same_seed_gives_the_same_interval_in_any_blocks(monkeypatch):
    from megatron_moe_inject.evaluation import bootstrap

    data = drawn(np.random.default_rng(0), 50, 0.1)
    first = paired_difference(*data)
    assert paired_difference(*data) == first
    assert paired_difference(*data, seed=2) != first
    monkeypatch.setattr(bootstrap, "_BLOCK", 1000)
    assert paired_difference(*data) == first


def test_a_narrower_level_gives_a_narrower_interval():
    data = drawn(np.random.default_rng(0), 50, 0.1)
    wide, narrow = paired_difference(*data), paired_difference(*data, level=0.5)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_one_sequence():
    found = paired_difference(np.array([96.0]), np.array([64.0]), np.array([32.0]))
    assert found == (-1.0, -1.0, -1.0)
