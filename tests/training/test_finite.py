"""A step that Megatron rejects for a NaN says where it began."""

import re

import pytest

from tests.harness.injection import inject


@pytest.mark.parametrize("mode", ["validate_results", "disabled"])
def test_the_first_states_that_are_not_finite_are_named(material, mode):
    """Megatron repeats the step and ends the run, or raises at once."""
    run = inject(
        material, extra=("--rerun-mode", mode), check=False, env={"TESTS_POISON_LAYER": "1"}
    )
    assert run.returncode
    assert [step["iteration"] for step in run.iterations] == [1, 2]
    found = re.findall(r"megatron_moe_inject: not finite in step 3 .*", run.output)
    assert len(found) == 1
    assert "first things first: states before the output layer (micro-batch 0" in found[0]
    assert "Looked at: states before the output layer, states of teacher coder, loss" in found[0]
    assert "states of teacher coder (" not in found[0]
