"""``retention.originals: host`` through the real ``pretrain()``: the same digits.

Everything trains and every retention is used, so that every kind of parameter has an original.
"""

import copy

import pytest

from tests.harness import lane
from tests.harness.injection import LAYOUTS, PROVEN, SLOW_LAYOUTS, inject, recipe_file
from tests.harness.material import student_flags
from tests.harness.training_recipes import EVERYTHING

DEVICE = EVERYTHING + "retention: {{experts: 1.0, l2: 0.05}}\nsteering: {{retention: 1.0}}\n"
HOST = DEVICE.replace("l2: 0.05", "l2: 0.05, originals: host")
TERMS = ("lm loss", "kd loss", "total loss", "grad norm")
HELD = ("retention loss", "expert retention", "l2 to start", "router retention")
ESSENTIAL = ("distributed optimizer, ep2",)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, id=name, marks=[] if name in ESSENTIAL else pytest.mark.slow)
        for name, layout in (LAYOUTS | SLOW_LAYOUTS).items()
        if "window" not in name
    ],
)
def test_where_the_originals_are_changes_nothing(material, layout):
    runs = [inject(material, recipe, **copy.deepcopy(layout)) for recipe in (DEVICE, HOST)]
    assert PROVEN.search(runs[1].output)
    assert "trains are kept in host memory" in runs[1].output
    for term in (*TERMS, *HELD):
        assert runs[1].losses(term) == runs[0].losses(term), term
    for term in HELD:
        assert min(runs[1].losses(term)[1:]) > 0, term


@pytest.mark.slow
def test_a_resumed_run_reads_them_into_host_memory(material, tmp_path):
    save = str(tmp_path / "resumed")
    train = ("--bf16", *lane.DISTRIBUTED_OPTIMIZER, "--train-iters", "6")
    keep = (*train, "--save", save, "--save-interval", "3")
    whole = inject(material, HOST, nproc=2, ep=2, extra=train)
    inject(material, HOST, nproc=2, ep=2, extra=(*keep, "--exit-interval", "3"))
    ours = ("--inject-recipe", recipe_file(material, HOST), "--load", save)
    resumed = lane.run(student_flags(*material.blend, *keep, *ours, ep=2), nproc=2)
    for term in (*TERMS, *HELD):
        assert resumed.losses(term) == whole.losses(term)[3:], term
