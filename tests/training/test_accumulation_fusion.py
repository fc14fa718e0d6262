"""Weight gradients that are added to ``main_grad`` within their products, through ``pretrain()``.

Production's default, with Apex's kernel in Megatron's own layers and TE's in its own. Here a
stand-in takes the place of Apex's kernel; the output layer's gradient is the loss's, that of
grouped experts the plugin's. The reference is the same training without.
"""

import pytest

from tests.harness import lane
from tests.harness.grouped import GROUPED, SCRIPT, TWO_OF_FOUR
from tests.harness.injection import PROVEN, TERMS, inject, recipe_file

FUSED = {"TESTS_FUSED_WGRAD": "1"}
HEAD = ("--inject-set", "train.output_layer=true")
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def apart(material):
    return inject(material, TWO_OF_FOUR, extra=HEAD)


@pytest.mark.parametrize(
    ("nproc", "layout", "extra", "script"),
    [
        pytest.param(1, {}, (), lane.PRETRAIN, id="one", marks=SLOW),
        pytest.param(2, {"tp": 2}, (), lane.PRETRAIN, id="tp2"),
        pytest.param(2, {"pp": 2}, (), lane.PRETRAIN, id="pp2", marks=SLOW),
        pytest.param(
            2, {"ep": 2}, (*lane.DISTRIBUTED_OPTIMIZER,), lane.PRETRAIN, id="ep2", marks=SLOW
        ),
        pytest.param(1, {}, GROUPED, SCRIPT, id="grouped", marks=SLOW),
        pytest.param(
            2,
            {"ep": 2},
            (*GROUPED, *lane.DISTRIBUTED_OPTIMIZER),
            SCRIPT,
            id="grouped, ep2",
            marks=SLOW,
        ),
    ],
)
def test_the_curve_is_that_of_gradients_added_afterwards(
    material, apart, nproc, layout, extra, script
):
    recipe = ("--inject-recipe", recipe_file(material, TWO_OF_FOUR), "--inject-verify-frozen")
    flags = material.flags(*recipe, *HEAD, *extra, **layout)
    run = lane.run(flags, nproc=nproc, script=script, env=FUSED, fresh=True)
    assert "gradient_accumulation_fusion .................... True" in run.output
    for term in TERMS:
        assert run.losses(term) == pytest.approx(apart.losses(term), rel=2e-5), term
    assert PROVEN.search(run.output)
