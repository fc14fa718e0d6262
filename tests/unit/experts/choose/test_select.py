"""Selection: the published choices, and what every rule promises."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_inject.experts import select_experts
from megatron_moe_inject.experts.choose.select import (
    Limits,
    by_budget,
    by_count,
    by_threshold,
    contrast,
    contrast_error,
)
from megatron_moe_inject.host.errors import (
    RecipeError,
)
from tests.harness.profiles import ESFT

matrices = st.integers(1, 12).flatmap(
    lambda experts: st.lists(
        st.lists(st.integers(0, 1000), min_size=experts, max_size=experts).filter(any),
        min_size=1,
        max_size=4,
    )
)
thresholds = st.integers(1, 10_000).map(lambda units: units / 10_000)


def units_of(row):
    """A layer's shares in whole units of 1e-4, as published configurations round them."""
    return [round(score / sum(row), 4) * 10_000 for score in row]


def message_of(call):
    with pytest.raises(RecipeError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


# the published configurations


@pytest.mark.parametrize("domain", ["intent", "law"])
def test_published_choices_come_out(domain):
    path = ESFT / f"{domain}.json"
    if not path.exists():
        pytest.skip(f"{path} is not there; set INJECT_SHARED to the folder that holds data/esft")
    data = json.loads(path.read_text())
    chosen = select_experts(data["selections"], threshold=0.2)
    published = [data["published_experts"][str(layer)] for layer in range(1, 27)]
    assert chosen == published  # ids and their order, 26 of 26 layers
    assert [sorted(ids) for ids in select_experts(data["gate_sums"], threshold=0.2)] != [
        sorted(ids) for ids in published
    ]


# by threshold


@given(matrices, thresholds)
def test_threshold_is_reached_by_the_fewest(scores, threshold):
    for row, ids in zip(scores, select_experts(scores, threshold=threshold), strict=True):
        units = [round(u) for u in units_of(row)]
        taken = [units[e] for e in ids]
        assert ids
        assert len(set(ids)) == len(ids)
        assert all(row[e] > 0 for e in ids)
        needed = threshold * 10_000 - 1e-6
        assert sum(taken[:-1]) < needed
        positive = [e for e, score in enumerate(row) if score > 0]
        assert sum(taken) >= needed or sorted(ids) == positive
        keys = [(-units[e], e) for e in ids]
        assert keys == sorted(keys)
        rest = [(-units[e], e) for e in positive if e not in ids]
        assert all(key > keys[-1] for key in rest)


@given(matrices, thresholds, st.randoms(use_true_random=False))
def test_permuting_experts_permutes_the_choice(scores, threshold, random):
    order = list(range(len(scores[0])))
    random.shuffle(order)
    there = select_experts([[row[e] for e in order] for row in scores], threshold=threshold)
    for row, ids, moved in zip(
        scores, select_experts(scores, threshold=threshold), there, strict=True
    ):
        back = [order[e] for e in moved]
        shares = [units_of(row)[e] for e in ids]
        assert [units_of(row)[e] for e in back] == shares
        if len(set(units_of(row))) == len(row):
            assert back == ids


@given(matrices, thresholds, st.integers(1, 1000))
def test_layers_are_independent_and_scale_does_not_matter(scores, threshold, factor):
    chosen = select_experts(scores, threshold=threshold)
    assert chosen == [select_experts([row], threshold=threshold)[0] for row in scores]
    assert select_experts(np.array(scores) * factor, threshold=threshold) == chosen


def test_sums_are_compared_exactly():
    """Every threshold that a sum of rounded shares meets exactly is met, and no further one is."""
    for units in range(5000, 9999, 7):
        row = [units, 10_000 - units]
        assert select_experts([row], threshold=units / 10_000) == [[0]]
        assert select_experts([row], threshold=(units + 1) / 10_000) == [[0, 1]]
    tenths = [[1] * 10]
    for count in range(
        1, 11
    ):  # as floats 0.1 + 0.1 + 0.1 is more than 0.3, ten of them less than 1
        assert select_experts(tenths, threshold=count / 10) == [list(range(count))]


def test_ties_and_rounding():
    assert select_experts([[3, 5, 5, 3]], threshold=0.7) == [[1, 2, 0]]
    # 0.03094 and 0.03086 of 1: the same after rounding, so the lower id comes first
    assert select_experts([[3086, 3094, 93820]], threshold=0.95) == [[2, 0]]
    # three thirds round to 0.9999, which is all there is; the expert without tokens stays out
    assert select_experts([[1, 1, 0, 1]], threshold=1.0) == [[0, 1, 3]]
    assert select_experts([[0, 0, 7]], threshold=1.0) == [[2]]


def test_anything_like_a_matrix_is_read():
    rows = [[1.0, 3.0], [2.0, 2.0]]
    for scores in (
        rows,
        tuple(map(tuple, rows)),
        np.array(rows, dtype=np.float32),
        torch.tensor(rows, dtype=torch.bfloat16),
        torch.tensor(rows, requires_grad=True),
    ):
        assert select_experts(scores, threshold=0.6) == [[1], [0, 1]]
    assert select_experts(np.zeros((0, 4)), threshold=0.5) == []


@pytest.mark.parametrize("threshold", [0, -0.1, 1.0001, float("nan"), float("inf")])
def test_thresholds_out_of_range(threshold):
    message = message_of(lambda: select_experts([[1.0]], threshold=threshold))
    assert message.startswith(f"threshold: {threshold!r} is not in (0, 1]")


@pytest.mark.parametrize(
    ("scores", "part"),
    [
        ([[1, 2], [float("nan"), 1]], "layer 1: a score is not finite"),
        ([[1, float("inf")]], "layer 0: a score is not finite"),
        ([[1e308, 1e308]], "layer 0: a score is not finite"),
        ([[1, -0.5]], "layer 0: score -0.5 is negative"),
        ([[1, 2], [0, 0]], "layer 1: no expert has a score"),
        ([1, 2], "scores: shape [2]; give [layers, experts]"),
        ([[[1]]], "scores: shape [1, 1, 1]"),
        ([[1, 2], [1]], "scores: not a matrix of numbers"),
        ("abc", "scores: "),
    ],
)
def test_scores_that_are_none(scores, part):
    assert part in message_of(lambda: select_experts(scores, threshold=0.2))


# constraints


@st.composite
def bounded(draw):
    """Positive scores with limits that they can meet."""
    ep, per_rank = draw(st.sampled_from([(1, 6), (2, 3), (3, 2), (4, 3)]))
    row = st.lists(st.integers(1, 99), min_size=ep * per_rank, max_size=ep * per_rank)
    scores = draw(st.lists(row, min_size=1, max_size=3))
    at_least = draw(st.integers(0, 4))
    at_most = draw(st.none() | st.integers(max(1, at_least), ep * per_rank))
    return scores, Limits(at_least, at_most, ep)


def check_limits(chosen, limits, experts):
    for ids in chosen:
        assert len(set(ids)) == len(ids) >= limits.at_least
        assert limits.at_most is None or len(ids) <= limits.at_most
        per_rank = np.bincount(np.array(ids, int) // (experts // limits.ep), minlength=limits.ep)
        assert per_rank.max() - per_rank.min() <= 1


@given(bounded(), thresholds)
def test_threshold_within_limits(case, threshold):
    scores, limits = case
    chosen = by_threshold(scores, threshold=threshold, limits=limits)
    check_limits(chosen, limits, len(scores[0]))
    for row, ids in zip(scores, chosen, strict=True):
        units = units_of(row)
        if len(ids) > max(1, limits.at_least):
            assert sum(units[e] for e in ids[:-1]) < threshold * 10_000
        if len(ids) < (limits.at_most or len(row)):
            assert sum(units[e] for e in ids) >= threshold * 10_000 - 1e-6
    if limits == Limits():
        assert chosen == select_experts(scores, threshold=threshold)


@given(bounded(), st.integers(1, 6))
def test_count_within_limits(case, n):
    scores, limits = case
    if limits.clamp(n) != n:
        assert f"n: {n} is outside the limits" in message_of(
            lambda: by_count(scores, n=n, limits=limits)
        )
        return
    chosen = by_count(scores, n=n, limits=limits)
    check_limits(chosen, limits, len(scores[0]))
    assert all(len(ids) == n for ids in chosen)


@settings(max_examples=60)
@given(bounded(), st.integers(1, 6))
def test_spread_choice_is_the_best_balanced_one(case, n):
    """Among all sets of n experts whose numbers per rank differ by at most one."""
    scores, limits = case
    row, ep = scores[0], limits.ep
    per_rank = len(row) // ep

    def balanced(ids):
        counts = np.bincount(np.array(ids) // per_rank, minlength=ep)
        return counts.max() - counts.min() <= 1

    best = max(
        sum(row[e] for e in ids)
        for ids in itertools.combinations(range(len(row)), n)
        if balanced(ids)
    )
    (chosen,) = by_count([row], n=n, limits=Limits(ep=ep))
    assert balanced(chosen)
    assert sum(row[e] for e in chosen) == best


def test_ranks_hold_experts_contiguously():
    row = [[9, 8, 7, 6, 1, 2, 3, 4]]
    assert by_count(row, n=4, limits=Limits(ep=2)) == [[0, 7, 1, 6]]
    assert by_count(row, n=4, limits=Limits(ep=4)) == [[0, 2, 7, 5]]
    assert by_count(row, n=4, limits=Limits(ep=8)) == by_count(row, n=4) == [[0, 1, 2, 3]]


def test_a_rank_without_scores_gets_none():
    assert by_count([[5, 4, 3, 0, 0, 0]], n=3, limits=Limits(ep=2)) == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (
            lambda: by_threshold([[1, 1, 0]], threshold=0.1, limits=Limits(3), layers=[12]),
            "layer 12: 3 experts are asked for, but only 2 have a score",
        ),
        (lambda: by_count([[1, 1], [1, 0]], n=2), "layer 1: 2 experts are asked for, but only 1"),
        (
            lambda: by_budget([[1, 0], [1, 1]], experts=4, limits=Limits(2)),
            "layer 0: 2 experts are asked for, but only 1 have a score",
        ),
        (lambda: by_count([[1, 1]], n=0), "n: 0 is outside"),
        (lambda: by_count([[1]], n=1, limits=Limits(at_most=0)), "n: 1 is outside the limits"),
        (
            lambda: by_threshold([[1]], threshold=1, limits=Limits(3, 2)),
            "at_most: 2 is too small; at_least is 3",
        ),
        (
            lambda: by_threshold([[1]], threshold=1, limits=Limits(0, 0)),
            "at_most: 0 is too small",
        ),
        (lambda: by_threshold([[1] * 6], threshold=1, limits=Limits(ep=4)), "ep: 4 does not div"),
        (lambda: by_threshold([[1] * 6], threshold=1, limits=Limits(ep=0)), "ep: 0 does not div"),
        (lambda: by_budget([[1, 1]], experts=0), "budget: 0 experts are too few; 1 are needed"),
        (
            lambda: by_budget([[1, 1]] * 3, experts=5, limits=Limits(2)),
            "budget: 5 experts are too few; 6 are needed",
        ),
    ],
)
def test_impossible_constraints(call, part):
    assert part in message_of(call)


# by budget


@settings(max_examples=80)
@given(
    st.lists(st.lists(st.integers(1, 50), min_size=4, max_size=4), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(0, 1),
    st.integers(2, 4),
)
def test_budget_buys_the_most_score(scores, experts, at_least, at_most):
    """Against every choice of sizes per layer: within a layer the best are best."""
    limits = Limits(at_least, at_most)
    if experts < at_least * len(scores):
        return
    chosen = by_budget(scores, experts=experts, limits=limits)
    sizes = itertools.product(range(at_least, at_most + 1), repeat=len(scores))
    best = max(
        sum(sum(sorted(row)[4 - n :]) for row, n in zip(scores, size, strict=True))
        for size in sizes
        if sum(size) <= experts
    )
    assert sum(map(len, chosen)) == min(experts, at_most * len(scores))
    assert sum(row[e] for row, ids in zip(scores, chosen, strict=True) for e in ids) == best
    assert all(at_least <= len(ids) <= at_most for ids in chosen)


@given(bounded(), st.integers(12, 30))
def test_budget_within_limits(case, experts):
    scores, limits = case
    chosen = by_budget(scores, experts=experts, limits=limits)
    check_limits(chosen, limits, len(scores[0]))
    most = sum(min(limits.at_most or len(row), len(row)) for row in scores)
    assert sum(map(len, chosen)) == min(experts, most)


def test_a_budget_looks_beyond_a_weak_rank():
    """Rank 1 of layer 0 is weak, but behind its expert another strong one of rank 0 waits."""
    scores = [[50, 48, 1, 1], [20, 5, 20, 5]]
    limits = Limits(ep=2)
    assert by_budget(scores, experts=3, limits=limits) == [[0, 2, 1], []]
    assert by_budget(scores, experts=3) == [[0, 1], [0]]


def test_a_budget_stops_where_nothing_is_gained():
    assert by_budget([[3, 0, 0], [0, 0, 2]], experts=5) == [[0], [2]]


# contrast


def test_contrast_is_each_experts_part_of_the_divergence():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(8), size=(2, 3))
    score = contrast(p * 1e12, q * 1e12)
    np.testing.assert_allclose(score.sum(1), (p * np.log(p / q)).sum(1), rtol=1e-6)
    assert ((score > 0) == (p > q)).all()


def test_contrast_prefers_what_general_data_needs_less():
    domain = [[300, 110, 100, 10, 480]]
    general = [[200, 10, 100, 0, 690]]
    first, second, same, rare, less = contrast(domain, general)[0]
    assert second > first > 0  # both 100 more of 1,000
    assert abs(same) < 1e-3
    assert rare < first  # a high ratio, but hardly used
    assert less < 0


def test_contrast_of_zeros():
    score = contrast([[0, 0, 10]], [[0, 10**6, 10**6]])[0]
    assert score[0] == score[1] == 0  # never chosen by the domain, whatever smoothing says
    few, many = (contrast([[50, 50]], [[0, n]])[0, 0] for n in (100, 100_000))
    assert np.isfinite([few, many]).all()
    assert many > few > 0  # the more general tokens pass the expert by, the surer the contrast
    assert contrast([[0, 0]], [[5, 5]]).tolist() == [[0, 0]]


@given(matrices, st.data())
def test_contrast_is_finite(counts, data):
    row = st.lists(st.integers(0, 1000), min_size=len(counts[0]), max_size=len(counts[0]))
    general = data.draw(st.lists(row, min_size=len(counts), max_size=len(counts)))
    assert np.isfinite(contrast(counts, general)).all()


def test_contrast_error_is_the_spread_of_repeated_recordings():
    rng = np.random.default_rng(1)
    p, q, n = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5]), 40_000
    domain, general = rng.multinomial(n, p, size=4000), rng.multinomial(n, q, size=4000)
    seen = contrast(domain, general).std(0)
    errors = [np.sqrt(share * (1 - share) / n)[None] for share in (p, q)]
    expected = contrast_error((p * n)[None], (q * n)[None], *errors)[0]
    np.testing.assert_allclose(seen, expected, rtol=0.05)
