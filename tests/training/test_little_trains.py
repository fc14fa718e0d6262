"""Distributed optimizers when little trains: it can be saved, and goes on bitwise.

A rank's share of what trains is then padding alone, on the last ranks where one norm trains, and
between two parameters where two short ones do.
"""

import pytest

from tests.harness import lane
from tests.harness.injection import RECIPE, TERMS, recipe_file
from tests.harness.material import student_flags
from tests.harness.training_recipes import LITTLE, ROWS

NORM = RECIPE + LITTLE.format("patterns: [decoder.layers.2.pre_mlp_layernorm.weight]")
ROW = ROWS.replace("2: [3], 3: [3]", "2: [3]")
RESHARDABLE = ("--dist-ckpt-optim-fully-reshardable",)
OPTIMIZER = ("--bf16", *lane.DISTRIBUTED_OPTIMIZER)
TORCH = ("--ckpt-format", "torch")
SLOW = pytest.mark.slow


def stopped_and_whole(material, folder, recipe, flags, nproc, **layout):
    """Four steps at once, and two and two."""
    ours = ("--inject-recipe", recipe_file(material, recipe), "--inject-verify-frozen", *flags)
    start = ("--load", material.student, "--finetune", "--no-load-optim", "--no-load-rng")
    if "torch" in flags:  # Megatron does not load the student's format into it
        start = ("--inject-from-scratch",)
    keep = ("--train-iters", "4", "--save", str(folder), "--save-interval", "2")
    base = student_flags(*material.blend, *ours, **layout)
    whole = lane.run([*base, *start, "--train-iters", "4"], nproc=nproc)
    lane.run([*base, *start, *keep, "--exit-interval", "2"], nproc=nproc)
    resumed = lane.run([*base, *keep, "--load", str(folder)], nproc=nproc)
    return whole, resumed


@pytest.mark.parametrize(
    ("recipe", "flags", "layout"),
    [
        pytest.param(NORM, (), {"nproc": 2}, id="norm, dp2"),
        pytest.param(ROW, (), {"nproc": 2, "ep": 2}, id="row, ep2"),
        pytest.param(ROWS, (), {"nproc": 4, "ep": 2}, id="rows, dp4", marks=SLOW),
        pytest.param(NORM, (), {"nproc": 2, "pp": 2}, id="norm, pp2", marks=SLOW),
        pytest.param(NORM, RESHARDABLE, {"nproc": 2}, id="reshardable", marks=SLOW),
        pytest.param(NORM, TORCH, {"nproc": 2}, id="torch", marks=SLOW),
    ],
)
def test_little_trains_saves_and_resumes_bitwise(material, tmp_path, recipe, flags, layout):
    whole, resumed = stopped_and_whole(
        material, tmp_path / "saved", recipe, (*flags, *OPTIMIZER), **layout
    )
    for term in TERMS:
        assert resumed.losses(term) == whole.losses(term)[2:], term
    assert "bitwise unchanged" in resumed.output
