"""What is loaded into a student: all of it under any name, or one error; never random weights."""

from pathlib import Path

import pytest
import torch

from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from tests.harness import lane
from tests.harness.checkpoints import whole
from tests.harness.injection import OTHER, RECIPE, TERMS, assert_clean_end, inject, recipe_file
from tests.harness.material import make_material, student_flags
from tests.harness.training_recipes import ROWS

TE_NAMES = (str(lane.HARNESS / "te_names.py"),)
NORMS = RECIPE + "train: {{norms: true}}\n"
START = ("--finetune", "--no-load-optim", "--no-load-rng")


def recipe(material, text=RECIPE) -> tuple[str, str]:
    return "--inject-recipe", recipe_file(material, text)


def either_name(material, folder, path=()) -> None:
    keep = ("--train-iters", "4", "--save", str(folder), "--save-interval", "2")
    start = ("--load", material.student, *START, *recipe(material, NORMS))
    run = {"nproc": 2, "pythonpath": path}
    local = lane.run(student_flags(*material.blend, *start, "--train-iters", "4", pp=2), **run)
    saved = lane.run(student_flags(*material.blend, *start, *keep, pp=2), script=TE_NAMES, **run)
    for term in TERMS:
        assert saved.losses(term) == local.losses(term), term
    stored = CheckpointPlace("--load", folder).open().tensors
    assert "decoder.layers.pre_mlp_layernorm.weight" in stored
    assert "decoder.layers.mlp.linear_fc1.layer_norm_weight" not in stored
    back = ("--load", str(folder), "--ckpt-step", "2", "--train-iters", "4")
    flags = student_flags(*material.blend, *recipe(material, NORMS), *back, pp=2)
    resumed = lane.run(flags, **run)
    for term in TERMS:
        assert resumed.losses(term) == local.losses(term)[2:], term


def test_either_name_of_a_norm_is_loaded(material, tmp_path):
    """Into the model and the optimizer, whichever kind of layers saved it; saved under its own."""
    either_name(material, tmp_path / "saved")


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no second Megatron-Core")
def test_either_name_of_a_norm_is_loaded_by_the_other_megatron(tmp_path):
    either_name(make_material(tmp_path, [OTHER]), tmp_path / "saved", [OTHER])


LOOSE = ("--dist-ckpt-strictness", "log_unexpected")
TIED = "--untie-embeddings-and-output-weights"
UNLIKE = {
    "more norms": (("--qk-layernorm", *LOOSE), dict(nproc=2, pp=2), "lacks decoder.layers.self_"),
    "more norms, all ignored": (
        ("--qk-layernorm", "--dist-ckpt-strictness", "ignore_all"),
        {},
        "lacks decoder.layers.self_attention.k_layernorm.weight, decoder",
    ),
    "a head besides": ((*LOOSE, "-"), {}, "holds output_layer.weight besides"),
    "fewer layers": (("--num-layers", "2"), dict(nproc=2, pp=2), "of shape [4, 32], not [2, 32]"),
    "more ids": (("--vocab-size", "100"), {}, "of 64 rows for a tokenizer of 100 ids"),
}


@pytest.mark.parametrize(("extra", "layout", "message"), UNLIKE.values(), ids=UNLIKE)
def test_a_student_that_is_not_all_loaded_is_one_error(material, extra, layout, message):
    """Whatever --dist-ckpt-strictness says, and on all ranks."""
    layout = dict(layout)
    nproc = layout.pop("nproc", 1)
    text = "domains: [{{name: code, data: [1]}}]\nobjective: {{alpha: 0, beta: 1}}\n"
    text += "train: {{experts: all}}\n"
    flags = material.flags(*recipe(material, text), *extra, **layout)
    if "-" in extra:
        flags = [flag for flag in flags if flag not in (TIED, "-")]
    run = lane.run(flags, nproc=nproc, check=False)
    assert_clean_end(run, (f"--load {material.student}/iter_0000003", message))


def test_the_old_format(material, tmp_path):
    """What trains is compared, and what a checkpoint lacks is an error: PyTorch's own strictness is
    taken back by Megatron."""
    student, saved = str(tmp_path / "student"), str(tmp_path / "saved")
    form = ("--ckpt-format", "torch", *material.blend)
    stock = ("--save", student, "--save-interval", "100", "--train-iters", "2")
    lane.run(student_flags(*form, *stock, ep=2), nproc=2)

    def run(*flags, text=RECIPE, check=False):
        given = student_flags(*form, *recipe(material, text), *flags, ep=2)
        return lane.run(given, nproc=2, check=check)

    assert_clean_end(run("--load", student, "--qk-layernorm"), ("lacks decoder.layers.0.self_",))
    keep = ("--train-iters", "6", "--save", saved, "--save-interval", "4")
    keep += ("--exit-interval", "4")
    first = run(*keep, "--load", student, check=True)
    assert "was saved without injection: its optimizer state is left" in first.output
    assert "is of no injection and stands at iteration 2: training goes on there" in first.output
    other = RECIPE.replace("[3]", "[1]")
    on = ("--load", saved, "--train-iters", "6")
    held = ("optimizer state of experts {2: [3], 3: [3]}, but now experts {2: [1], 3: [1]} trains",)
    assert_clean_end(run(*on, text=other), held)
    assert [step["iteration"] for step in run(*on, check=True).iterations] == [5, 6]


NOTHING = {
    "train": ((), {}, ": missing, so the student would begin with random weights"),
    "train, ep2": (("--load", "/typo/student"), dict(nproc=2, ep=2), " /typo/student holds no"),
    "profile": (("--load", "/typo/student", "--inject-profile"), {}, " /typo/student holds no"),
    "evaluate": (("--load", "/typo/student", "--inject-evaluate"), {}, " /typo/student holds no"),
}


@pytest.mark.parametrize(("flags", "layout", "message"), NOTHING.values(), ids=NOTHING)
def test_no_checkpoint_is_one_error(material, tmp_path, flags, layout, message):
    layout, path = dict(layout), tmp_path / "found.json"
    nproc = layout.pop("nproc", 1)
    if flags and flags[-1].startswith("--inject"):
        flags += (str(path), "--skip-train", "--eval-iters", "2")
    given = student_flags(*material.blend, *recipe(material), *flags, *START, **layout)
    run = lane.run(given, nproc=nproc, check=False)
    assert_clean_end(run, (f"--load{message}", "--inject-from-scratch"))
    assert not path.exists()


def test_no_row_of_a_router_takes_over_the_state_of_another(material, tmp_path):
    """In bf16 that state holds a float32 copy of the row, which would be written over it."""
    first, second = tmp_path / "first", tmp_path / "second"
    saved = ("--bf16", "--save-interval", "100", "--save")
    inject(material, ROWS, extra=(*saved, str(first), "--train-iters", "2"))
    on = ("--load", str(first), *saved, str(second), "--train-iters", "3")
    other = ROWS.replace("2: [3], 3: [3]", "2: [0], 3: [1]")
    flags = student_flags(*material.blend, *recipe(material, other), *on)
    held = "router rows {2: [3], 3: [3]}, but now router rows {2: [0], 3: [1]} trains"
    assert_clean_end(lane.run(flags, check=False), (held, "--no-load-optim"))
    lane.run([*flags, "--no-load-optim"])
    before, after = (_routers(folder) for folder in (first, second))
    moved = (after - before).abs().amax(-1)
    assert [(layer, row) for layer, row in moved.nonzero().tolist()] == [(2, 0), (3, 1)]
    assert moved.max() < 0.02, "one step of 0.01"


def _routers(folder: Path) -> torch.Tensor:
    """Router matrices ``[L, E, h]`` of a checkpoint."""
    checkpoint = CheckpointPlace("--load", folder).open()
    return whole(checkpoint, "decoder.layers.mlp.router.weight").float()
