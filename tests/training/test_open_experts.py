"""New experts behind a door: shut at first, then found by the domain and by nothing else."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
import torch

from megatron_moe_inject.cli import main
from megatron_moe_inject.experts.delta.delta import CheckpointPlace
from megatron_moe_inject.host.new_experts import STORED as CARD
from megatron_moe_inject.host.open_door import STORED
from tests.harness import lane
from tests.harness.checkpoints import SAVE, changed, whole
from tests.harness.injection import LAYOUTS, OTHER, PROVEN, assert_clean_end, inject, recipe_file
from tests.harness.material import student_flags

STILL = ("--moe-router-load-balancing-type", "none")
SIGMOID = (*lane.DEEPSEEK_ROUTER, *STILL)
ROUTERS = {
    "softmax": ("--moe-router-topk", "2"),
    "sigmoid, groups, bias": SIGMOID,
}
BIAS = "decoder.layers.mlp.router.expert_bias"
OPEN = {2: 0.0, 10: 1.0}
RECIPE = """
domains:
  - {{name: code, data: [1], teacher: coder, experts: {{new: all}}}}
teachers:
  coder: {{source: "megatron:{teacher}"}}
objective: {{alpha: 0.7, beta: 0.3, gamma: 0.5}}
train: {{router_rows: true}}
steering: {{coeff: 1.0, target_mass: 0.9, retention: 10.0}}
routing: {{open: {{points: {{2: 0.0, 10: 1.0}}}}}}
"""


def opened(folder):
    return CheckpointPlace("CKPT", Path(folder)).open()


@pytest.fixture(scope="module")
def grown(material, tmp_path_factory):
    """A student of each kind of router, and it with two new experts in each layer."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp("grown")
        base = folder / "student"
        if kind == "softmax":
            base = Path(material.student)
        else:
            data = ("--data-path", material.general, "--split", "90,5,5", "--train-iters", "3")
            lane.run(student_flags(*data, *ROUTERS[kind], *SAVE, str(base)))
        arguments = ["add-experts", str(base), "--output", str(folder / "grown")]
        assert main([*arguments, "--per-layer", "2", "--donors", "0,2"]) == 0
        return base, folder / "grown"

    return make


def opening(material, grown, kind, *flags, recipe=RECIPE, iterations=24, layout="", **more):
    _, load = grown(kind)
    at = dict(LAYOUTS[layout]) if layout else {}
    own = (*ROUTERS[kind], "--load", str(load), "--num-experts", "6", *at.pop("extra", ()))
    extra = (*own, "--train-iters", str(iterations), *flags)
    return inject(material, recipe, extra=extra, **at, **more)


@pytest.mark.parametrize("kind", ROUTERS)
def test_try(material, grown, kind):
    run = opening(material, grown, kind)
    for name in (
        "new experts open",
        "target share/code",
        "general on targets/code",
        "kd loss",
        "retention loss",
        "router retention",
    ):
        print(name, run.losses(name))
