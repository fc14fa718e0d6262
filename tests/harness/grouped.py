"""Runs of grouped experts around a stand-in for Transformer Engine's grouped linear layer."""

import pytest

from tests.harness import lane
from tests.harness.injection import RECIPE, recipe_file

SCRIPT = (str(lane.HARNESS / "grouped_gpt.py"),)
TWO_OF_FOUR = RECIPE.replace("{{2: [3], 3: [3]}}", "{{2: [0, 3], 3: [1]}}")
GROUPED = ("--moe-grouped-gemm",)
layouts = pytest.mark.parametrize(
    ("nproc", "layout", "extra"),
    [
        pytest.param(1, {}, (), id="one"),
        pytest.param(2, {"ep": 2}, (), id="ep2"),
        pytest.param(2, {"pp": 2}, (), id="pp2"),
        pytest.param(2, {"ep": 2}, tuple(lane.DISTRIBUTED_OPTIMIZER), id="distributed optimizer"),
        pytest.param(2, {}, tuple(lane.DISTRIBUTED_OPTIMIZER), id="dp2, distributed optimizer"),
        pytest.param(
            1,
            {},
            ("--recompute-granularity", "selective", "--recompute-modules", "moe"),
            id="recompute",
        ),
    ],
)


def grouped(material, *extra, nproc=1, recipe=TWO_OF_FOUR, env=None, **layout):
    ours = ("--inject-recipe", recipe_file(material, recipe), "--inject-verify-frozen")
    flags = material.flags(*ours, *GROUPED, *extra, **layout)
    return lane.run(flags, nproc=nproc, script=SCRIPT, env=env)
