"""Adapters in a checkpoint: never left out without a word; merged, stock Megatron loads it."""

import pytest
import torch

from megatron_moe_inject.cli import main
from tests.harness import lane
from tests.harness.injection import RECIPE, assert_clean_end, recipe_file
from tests.harness.material import student_flags
from tests.harness.stored_adapters import entry, opened, write_adapters

FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
FC2 = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
QKV = "decoder.layers.self_attention.linear_qkv.weight"
SITES = {(FC1, (1, 2)): [0], (FC2, (1, 2)): [0], (FC1, (3, 0)): [0], (QKV, (0,)): [0]}
START = ("--finetune", "--no-load-optim", "--no-load-rng")
REMEDY = "write a checkpoint that has them in its weights by moe-inject merge-adapters"
HELD = "holds adapters or vocabulary rows beside its weights (decoder.layers.mlp.experts.experts"


@pytest.fixture
def adapted(material, tmp_path):
    folder = tmp_path / "adapted"
    write_adapters(material.student, folder, SITES, [entry(4, 16.0)], ids=[3, 9])
    return folder


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_student_without_adapters_does_not_leave_them_out(material, adapted, tmp_path, evaluates):
    found = ("--inject-evaluate", str(tmp_path / "x.json"), "--skip-train", "--eval-iters", "2")
    flags = ("--load", str(adapted), *START, *(found if evaluates else ("--train-iters", "1")))
    recipe = ("--inject-recipe", recipe_file(material, RECIPE))
    run = lane.run(student_flags(*material.blend, *recipe, *flags, ep=2), nproc=2, check=False)
    assert_clean_end(run, (f"--load {adapted}/iter_0000020 {HELD}", REMEDY))


def test_a_teacher_with_adapters_is_refused(material, tmp_path):
    folder, site = tmp_path / "adapted", ("decoder.layers.mlp.linear_fc1.weight", (1,))
    write_adapters(material.teacher, folder, {site: [0]}, [entry(4, 16.0)])
    text = RECIPE.replace("megatron:{teacher}", f"megatron:{folder}")
    assert text != RECIPE
    recipe = ("--inject-recipe", recipe_file(material, text))
    flags = (*material.blend, *recipe, "--load", material.student, *START, "--train-iters", "1")
    run = lane.run(student_flags(*flags), check=False)
    assert_clean_end(run, ("teachers.coder.source: ", "holds adapters", REMEDY))


def test_stock_megatron_loads_what_is_merged(material, adapted, tmp_path):
    """Its loss is the base's no more."""
    merged = tmp_path / "merged"
    assert main(["merge-adapters", "--trained", str(adapted), "--output", str(merged)]) == 0
    assert not [name for name in opened(merged).tensors if "inject" in name]

    def losses(folder):
        flags = (*material.blend, "--load", str(folder), *START, "--train-iters", "2")
        return torch.tensor(lane.run(student_flags(*flags, ep=2), nproc=2).losses("lm loss"))

    assert (losses(merged) - losses(material.student)).abs().min() > 1e-3
