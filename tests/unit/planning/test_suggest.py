"""Which layouts are searched."""

from dataclasses import replace

import pytest

from megatron_moe_inject.planning.suggest import Candidate, Model, ends, layouts

DEEPSEEK = Model(61, 256, 128, 128, micro_batch=1, global_batch=512, predicts=True)


@pytest.mark.parametrize("pp", [1, 2, 3, 4, 7, 8, 16, 32, 61])
def test_stages_have_all_layers_and_the_ends_no_more_than_others(pp):
    found = ends(61, pp)
    if found is None:
        assert pp in (1, 32, 61)  # an end of 32 stages of two would have none
        return
    first, last = found
    assert 1 <= last <= first
    middle = 61 - first - last
    assert middle == 0 if pp == 2 else middle % (pp - 2) == 0
    assert pp == 2 or first <= middle // (pp - 2)


def test_a_prime_number_of_layers_is_divided_too():
    found = {layout.pp: layout for layout in layouts(DEEPSEEK, 64, 1) if layout.ep == 8}
    assert {1, 2, 4, 8} <= set(found)
    flags = Candidate(found[8], "none", ends(61, 8)).flags()
    assert flags[flags.index("--decoder-first-pipeline-num-layers") + 1] == "7"
    assert flags[flags.index("--decoder-last-pipeline-num-layers") + 1] == "6"


def test_a_patterns_stages_are_even():
    hybrid = replace(DEEPSEEK, pattern=True)
    assert {layout.pp for layout in layouts(hybrid, 64, 1)} == {1}
