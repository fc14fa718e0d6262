"""Expert-output retention and L2 to the start through the real ``pretrain()``.

Experts of both of two expert-parallel ranks and both of two pipeline stages train, several in one
layer, so that the mean over layers, ranks and experts is seen.
"""

import copy

import pytest

from tests.training import lane
from tests.training.test_injection import PROVEN, RECIPE, every_layout, inject

HELD = RECIPE.replace("{{2: [3], 3: [3]}}", "{{1: [1], 3: [0, 3]}}").replace(
    "beta: 0.3", "beta: 0.3, retention: {{experts: 2.0, l2: 0.05}}"
)
TERMS = ("lm loss", "kd loss", "expert retention", "l2 to start", "total loss", "grad norm")


@pytest.fixture(scope="module")
def single(material):
    return inject(material, HELD)


@every_layout(without="window")
def test_the_curve_does_not_depend_on_the_layout(material, single, layout):
    run = inject(material, HELD, **copy.deepcopy(layout))
    assert len(run.iterations) == 4
    for term in TERMS:
        assert run.losses(term) == pytest.approx(single.losses(term), rel=2e-5, abs=1e-7), term
    assert PROVEN.search(run.output)
