"""``retention.originals: host`` through the real ``pretrain()``: the same digits.

Everything trains and every retention is used, so that every kind of parameter has an original.
"""

import pytest

from tests.harness.injection import LAYOUTS, PROVEN, inject
from tests.harness.training_recipes import EVERYTHING

DEVICE = EVERYTHING + "retention: {{experts: 1.0, l2: 0.05}}\nsteering: {{retention: 1.0}}\n"
HOST = DEVICE.replace("l2: 0.05", "l2: 0.05, originals: host")
TERMS = ("lm loss", "kd loss", "total loss", "grad norm")
HELD = ("retention loss", "expert retention", "l2 to start", "router retention")


@pytest.mark.parametrize(
    "layout",
    ["ep2, distributed optimizer", pytest.param("pp2-vpp2-ep2", marks=pytest.mark.slow)],
)
def test_where_the_originals_are_changes_nothing(material, layout):
    runs = [inject(material, recipe, **LAYOUTS[layout]) for recipe in (DEVICE, HOST)]
    assert PROVEN.search(runs[1].output)
    assert "trains are kept in host memory" in runs[1].output
    for term in (*TERMS, *HELD):
        assert runs[1].losses(term) == runs[0].losses(term), term
    for term in HELD:
        assert min(runs[1].losses(term)[1:]) > 0, term
