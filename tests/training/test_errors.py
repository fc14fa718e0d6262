"""Mistakes end at start: one message, the same exit on every rank, no traceback, no hang."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe_inject.host.save_lock import SaveLock
from tests.harness import lane
from tests.harness.injection import RECIPE, assert_clean_end, inject, recipe_file
from tests.harness.material import EVALUATES

EARLY = (str(lane.HARNESS / "early_gpt.py"),)
WRONG = {
    "an expert the student lacks": (
        RECIPE.replace("[3]", "[3, 4]", 1).replace("2: [3, 4]", "2: [3, 9]"),
        ("domains[0].experts.layers", "9", "0 to 3"),
    ),
    "a layer the student lacks": (
        RECIPE.replace("3: [3]", "7: [3]"),
        ("domains[0].experts.layers", "7", "0 to 3"),
    ),
    "a dataset the blend lacks": (
        RECIPE.replace("data: [1]", "data: [2]"),
        ("domains[0].data", "2"),
    ),
    "a teacher that is not there": (
        RECIPE.replace("{teacher}", "{teacher}/nowhere"),
        ("teachers.coder.source", "nowhere", "existing directory"),
    ),
    "an unknown key": (
        RECIPE + "stering: {{coeff: 0.1}}\n",
        ("stering",),
    ),
}


@pytest.mark.parametrize(("recipe", "fragments"), WRONG.values(), ids=WRONG)
def test_a_wrong_recipe_ends_at_start(material, recipe, fragments):
    assert recipe != RECIPE
    assert_clean_end(inject(material, recipe, check=False), fragments)


def test_a_script_that_took_pretrain_too_early_does_not_train_without_its_recipe(material):
    flags = material.flags("--inject-recipe", recipe_file(material, RECIPE), ep=2)
    run = lane.run(flags, nproc=2, script=EARLY, check=False)
    assert_clean_end(run, ("--inject-*", "install()", "above the script's first import"))


DATA = {
    "no validation data": (
        ("--split", "1,0,0"),
        ("--eval-iters 1", "no validation data", "--valid-data-path"),
    ),
    "a share of no document": (
        ("--split", "99,0.5,0.5"),
        ("--split", "99,0.5,0.5", "of 40 documents, none for validation"),
    ),
    "a weight of zero": (
        ("--data-path", "0", "{general}", "1", "{domain}"),
        ("--data-path: 0.0 is no weight of {general}", "a weight is above 0"),
    ),
}


@pytest.mark.parametrize(("flags", "fragments"), DATA.values(), ids=DATA)
def test_data_that_cannot_be_read_to_the_end_ends_at_start(material, flags, fragments):
    flags, fragments = (
        [x.format(general=material.general, domain=material.domain) for x in given]
        for given in (flags, fragments)
    )
    assert_clean_end(
        inject(material, nproc=2, pp=2, extra=(*EVALUATES, *flags), check=False), fragments
    )


def test_two_runs_do_not_save_into_one_folder(material, tmp_path):
    lock = SaveLock(tmp_path)
    lock.take()
    extra = ("--save", str(tmp_path), "--save-interval", "100")
    run = inject(material, nproc=2, ep=2, extra=extra, check=False)
    assert_clean_end(run, ("--save", str(tmp_path), "in use by another run"))


def test_data_that_is_not_there_leaves_nothing_behind(material, tmp_path):
    save = tmp_path / "save"
    extra = ("--data-path", "1", f"{material.general}-none", "1", material.domain)
    extra += ("--save", str(save), "--save-interval", "100")
    run = inject(material, nproc=2, ep=2, extra=extra, check=False)
    assert_clean_end(run, ("--data-path: ", f"{material.general}-none' has no ", "found on rank 0"))
    assert not save.exists()


def test_a_teacher_that_only_the_last_stage_finds_broken_ends_every_rank(material, tmp_path):
    broken = tmp_path / "teacher"
    shutil.copytree(material.teacher, broken)
    weights = sorted(Path(broken).rglob("*.distcp"))
    assert weights
    for file in weights:
        file.write_bytes(file.read_bytes()[:64])
    recipe = RECIPE.replace("{teacher}", str(broken))
    run = inject(material, recipe, nproc=2, pp=2, check=False)
    assert_clean_end(run, ("teachers.coder.source", str(broken)))


RANK = "${{oc.env:RANK}}"
"""In a recipe: another value on every rank."""


def teacher_of_the_first_rank(material):
    """A recipe whose teacher has the rank in its name; only the first rank's is there."""
    first = Path(f"{material.teacher}0")
    if not first.exists():
        first.symlink_to(material.teacher)
    return RECIPE.replace("{teacher}", "{teacher}" + RANK)


def test_what_only_some_ranks_read_ends_every_rank_with_one_message(material):
    decoded = "gamma: '${{oc.decode:" + RANK + "}}', temperature"
    for recipe, fragments in (
        (RECIPE.replace("temperature", decoded), ("gamma: 1.0 on rank 1, but 0.0 on rank 0",)),
        (teacher_of_the_first_rank(material), ("1' is no directory", "found on rank 1 of 2")),
    ):
        run = inject(material, recipe, nproc=2, ep=2, check=False)
        assert_clean_end(run, fragments)
        assert run.output.count("megatron_moe_inject: error: ") == 1


def test_a_mistake_is_the_last_thing_on_the_screen_also_under_torchrun(material):
    """Of a rank that is not the first of its node: nothing of it was seen."""
    recipe = recipe_file(material, teacher_of_the_first_rank(material))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [
        sys.executable, *torchrun, "-m", "megatron_moe_inject.pretrain", "--cpu",
        *material.flags("--inject-recipe", recipe, ep=2),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(lane.ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("megatron_moe_inject: error: ")]
    assert len(said) == 2, done.stderr  # by the rank, and in torchrun's block
    assert said[0] == said[1] == lines[-2]
    assert "found on rank 1 of 2" in said[0]
    assert set(lines[-1]) == {"="}


def test_plain_flags_are_enough_and_their_mistakes_name_the_flag(material):
    flags = (
        *("--inject-teacher", f"megatron:{material.teacher}", "--inject-domain-data", "1"),
        *("--inject-experts", "2:3;3:3", "--inject-alpha", "0.7", "--inject-beta", "0.3"),
    )
    good = lane.run(material.flags(*flags, "--inject-temperature", "2.0"))
    same = inject(material)
    assert good.losses("total loss") == same.losses("total loss")
    wrong = lane.run(material.flags(*flags, "--inject-temperature", "-2"), check=False)
    assert_clean_end(wrong, ("--inject-temperature", "-2"))


@pytest.mark.parametrize(
    "flag",
    [
        "--moe-single-grouped-weight",
        "--use-transformer-engine-op-fuser",
        "--delay-wgrad-compute",
        "--fp8-param-gather --fp8-recipe delayed",
        "--moe-router-load-balancing-type quantile_balancing",
    ],
)
def test_flags_that_would_go_wrong_silently_are_refused_by_name(flag):
    from argparse import ArgumentParser

    from megatron.training.arguments import add_megatron_arguments

    from megatron_moe_inject.host.errors import RecipeError
    from megatron_moe_inject.recipe.load import recipe_from_flags
    from megatron_moe_inject.recipe.run_kinds import INJECTION
    from megatron_moe_inject.run import Run

    common = "--num-layers 4 --num-experts 4 --mock-data --moe-grouped-gemm --fp8-format hybrid"
    command = f"{common} --fp8-recipe tensorwise {flag}"
    args = add_megatron_arguments(ArgumentParser()).parse_args(command.split())
    args.inject_dry_run = None
    recipe = recipe_from_flags(data=[0], experts="2:3", beta=1.0, alpha=0.0)
    with pytest.raises(RecipeError, match=flag.partition(" --")[0]):
        Run(INJECTION, recipe, args, valid_vocab_size=64)
