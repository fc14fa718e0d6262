"""Routers that a recipe freezes keep their bias, whatever version of Megatron would move it."""

import shlex

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.harness import lane
from tests.harness.injection import OTHER, PROVEN, recipe_file
from tests.harness.material import student_flags

STEERED = """
domains:
  - {{name: code, data: [1], experts: {{layers: {{2: [3], 3: [3]}}}}}}
objective: {{alpha: 0.0, beta: 1.0}}
train: {{experts: selected{more}}}
steering: {{coeff: 0.5, bias_counts: 0.5}}
"""
ROUTERS = "--moe-router-score-function sigmoid --moe-router-enable-expert-bias"


def biases(folder):
    """Bias of each layer's router in the checkpoint after the third step, ``[layers, E]``."""
    found = {"decoder.layers.mlp.router.expert_bias": torch.full((4, 4), torch.nan)}
    dcp.load(found, storage_reader=dcp.FileSystemReader(str(folder / "iter_0000003")))
    return found.popitem()[1]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param((), id="0.19"),
        pytest.param(
            (OTHER,), id="0.18",
            marks=pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no second Megatron"),
        ),
    ],
)  # fmt: skip
def test_frozen_routers_keep_their_bias_and_the_one_that_trains_does_not(material, tmp_path, other):
    """Layer 2 trains whole, its router with it; expert parallel, with steering."""
    recipe = STEERED.replace("{more}", ", layers: [2]")
    ours = ("--inject-recipe", recipe_file(material, recipe), "--inject-verify-frozen")
    save = ("--save", str(tmp_path), "--save-interval", "3")
    anew = ("--inject-from-scratch",)
    flags = student_flags(*material.blend, *shlex.split(ROUTERS), *ours, *save, *anew, ep=2)
    run = lane.run(flags, nproc=2, pythonpath=other)
    assert PROVEN.search(run.output)
    assert biases(tmp_path).any(dim=1).tolist() == [False, False, True, False]
