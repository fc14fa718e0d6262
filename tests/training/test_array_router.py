"""The covering array with routers and the output layer that train.

Its files differ in nothing but their sets; each is one process's share of the suite.
"""

import pytest

from tests.harness.array_runs import check_resumed, check_row, check_terms, resumed, rows

SETS = ("router",)


@pytest.mark.parametrize(("layout", "name"), rows(*SETS))
def test_a_layout_gives_what_one_process_gives(known_run, layout, name):
    check_row(known_run, layout, name)


@pytest.mark.parametrize("name", SETS)
def test_each_feature_of_a_set_shows_in_the_log(known_run, name):
    check_terms(known_run, name)


@pytest.mark.parametrize(("layout", "name", "flags"), resumed(*SETS))
def test_a_resumed_run_goes_on_bitwise(known_run, stopped_run, layout, name, flags):
    check_resumed(known_run, stopped_run, layout, name, flags)
