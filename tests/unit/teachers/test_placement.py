"""Which stages hold a teacher."""

import pytest

from megatron_moe_inject.teachers.placement import Wish, placements, spare_bytes

GIB = 1 << 30


def spread(wishes, stages=4, spare=None):
    return {name: found.spread for name, found in placements(wishes, stages, spare).items()}


@pytest.mark.parametrize("ranks", ["auto", "last", "pipeline"])
def test_one_stage_is_the_last_one(ranks):
    found = placements({"t": Wish(ranks, GIB)}, 1, None)["t"]
    assert not found.spread
    assert list(found.stages(1)) == [0]


def test_the_recipe_decides():
    wishes = {"a": Wish("last", 1), "b": Wish("pipeline", 99 * GIB), "c": Wish("pipeline", 1, True)}
    assert spread(wishes, spare=GIB) == {"a": False, "b": True, "c": True}
    found = placements(wishes, 4, GIB)
    assert [list(found[name].stages(4)) for name in "ab"] == [[3], [0, 1, 2, 3]]
    assert [found[name].sequences(7, 4, 8192) for name in "ab"] == [[0, 0, 0, 7], [1, 2, 2, 2]]
    assert found["b"].sequences(7, 4, 8192, ratio=2.0) == [1, 1, 2, 3]


def test_auto_takes_all_stages_where_a_quarter_of_what_is_left_is_enough():
    assert spread({"t": Wish("auto", 13 * GIB)}, spare=52 * GIB) == {"t": True}
    assert spread({"t": Wish("auto", 13 * GIB)}, spare=52 * GIB - 1) == {"t": False}
    assert spread({"t": Wish("auto", 13 * GIB)}, spare=-GIB) == {"t": False}
    assert spread({"t": Wish("auto", 13 * GIB)}) == {"t": True}
    reason = placements({"t": Wish("auto", 13 * GIB)}, 2, 40 * GIB)["t"].reason
    assert reason == (
        "since 13.0 GiB are more than a quarter of the 40.0 GiB that student and optimizer leave "
        "on the other stages"
    )


def test_all_that_would_be_spread_counts_together_but_no_window_and_no_last():
    wishes = {"a": Wish("auto", GIB), "b": Wish("pipeline", 2 * GIB), "c": Wish("last", 9 * GIB)}
    wishes["d"] = Wish("auto", 9 * GIB, windowed=True)
    assert spread(wishes, spare=12 * GIB) == {"a": True, "b": True, "c": False, "d": False}
    assert spread(wishes, spare=11 * GIB) == {"a": False, "b": True, "c": False, "d": False}


def test_what_trains_takes_a_gradient_a_copy_and_two_moments():
    assert spare_bytes(80, 20, 3) == 80 - 20 - 3 * 16
