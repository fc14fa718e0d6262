"""Schedules of loss weights."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe_inject.recipe.schedule import (
    SHAPES,
    Schedule,
    ever_positive,
    show_weight,
    value_at,
)

RAMP = Schedule({100: 0.0, 200: 1.0, 400: 0.5})


@pytest.mark.parametrize(
    ("iteration", "value"),
    [(0, 0.0), (100, 0.0), (150, 0.5), (200, 1.0), (300, 0.75), (400, 0.5), (10**9, 0.5)],
)
def test_lines_between_points_and_constant_outside(iteration, value):
    assert RAMP.at(iteration) == value


@pytest.mark.parametrize(
    ("iteration", "value"), [(100, 0.0), (125, 0.14645), (150, 0.5), (200, 1.0)]
)
def test_cosine_is_flat_at_the_points(iteration, value):
    assert Schedule({100: 0.0, 200: 1.0}, "cosine").at(iteration) == pytest.approx(value, abs=1e-5)


@given(
    st.dictionaries(st.integers(0, 1000), st.floats(0, 10), min_size=1, max_size=6),
    st.sampled_from(SHAPES),
    st.integers(0, 1200),
)
def test_goes_through_its_points_and_stays_between_neighbours(points, shape, iteration):
    schedule = Schedule(points, shape)
    for step, value in points.items():
        assert schedule.at(step) == pytest.approx(value, abs=1e-12)
    slack = 1e-9
    assert min(points.values()) - slack <= schedule.at(iteration) <= max(points.values()) + slack


def test_a_number_is_a_weight_as_well():
    assert value_at(0.7, 12) == 0.7
    assert value_at(RAMP, 150) == 0.5
    assert ever_positive(RAMP)
    assert not ever_positive(0.0)
    assert not ever_positive(Schedule({0: 0.0}))
    assert show_weight(0.7) == "0.7"
    assert show_weight(RAMP) == "linear(100: 0, 200: 1, 400: 0.5)"
