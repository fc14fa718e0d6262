"""Where a run begins: what is left to train, what it would save over, another recipe."""

from types import SimpleNamespace

import pytest

from megatron_moe_inject.recipe.beginning import BeginningFeature
from megatron_moe_inject.recipe.beginning_checks import VALUES, check_beginning, recipe_values
from megatron_moe_inject.recipe.load import recipe_from_yaml
from megatron_moe_inject.recipe.run_kinds import EVALUATION, INJECTION, PROFILE
from tests.harness.checkpoints import load_arguments, write_described
from tests.harness.recipes import facts, message_of, text_with

RECIPE = recipe_from_yaml(text_with({}))
OURS, OTHER = "1dea" * 8, "beef" * 8


def arguments(load=None, save=None, **changed):
    given = {"save": None if save is None else str(save), "skip_train": False}
    given |= {"train_iters": 120, "train_samples": None, "inject_from_scratch": None}
    return load_arguments(load, **given | changed)


def injected(root, iteration, identity=OURS, **stored):
    lineage = {"identity": identity, "kept": {}, "gate": None}
    return write_described(root, iteration, inject_policy={}, inject_lineage=lineage, **stored)


def test_training_of_a_student_that_goes_on_is_told(tmp_path):
    folder = write_described(tmp_path, 60)
    (remark,) = check_beginning(RECIPE, arguments(tmp_path))
    assert remark.startswith(f"{folder} is of no injection and stands at iteration 60: training")
    assert remark.endswith("add --finetune to begin at 0")
    assert check_beginning(RECIPE, arguments(tmp_path, finetune=True)) == []
    pretrained = arguments(tmp_path / "none", pretrained_checkpoint=str(tmp_path))
    assert check_beginning(RECIPE, pretrained) == []
    injected(tmp_path / "injected", 60)
    assert check_beginning(RECIPE, arguments(tmp_path / "injected")) == []


@pytest.mark.parametrize(
    ("iteration", "changes", "said"),
    [
        (160, {}, "stands at iteration 160, so that --train-iters 120 leaves nothing to train"),
        (120, {}, "stands at iteration 120"),
        (119, {}, None),
        (160, {"finetune": True}, None),
        (160, {"skip_train": True}, None),
        (9, {"train_iters": None, "train_samples": 80}, "at sample 80, so that --train-samples 80"),
        (9, {"train_iters": None, "train_samples": 81}, None),
    ],
)
def test_something_must_be_left_to_train(tmp_path, iteration, changes, said):
    folder = write_described(tmp_path, iteration, consumed_train_samples=80)
    args = arguments(tmp_path, **changes)
    if said is None:
        check_beginning(RECIPE, args)
        return
    message = message_of(lambda: check_beginning(RECIPE, args))
    assert message.startswith(f"--load {folder} stands at")
    assert said in message
    assert message.endswith("add --finetune to begin an injection at 0, or raise it")


def test_an_injection_that_is_done_is_not_to_begin_anew(tmp_path):
    injected(tmp_path, 120)
    message = message_of(lambda: check_beginning(RECIPE, arguments(tmp_path)))
    assert message.endswith("leaves nothing to train; raise it")


def test_a_new_injection_does_not_save_over_another(tmp_path):
    """As a job that is requeued with the command that began it."""
    student, saved = tmp_path / "student", tmp_path / "saved"
    write_described(student, 160)
    again = arguments(student, saved, finetune=True)
    assert check_beginning(RECIPE, again) == []
    injected(saved, 60)
    message = message_of(lambda: check_beginning(RECIPE, again))
    held = f"--save: '{saved}' holds iteration 60 of another injection, and this run begins at 0"
    assert message.startswith(held)
    for remedy in (f"--load '{saved}' without --finetune", "--pretrained-checkpoint", "another"):
        assert remedy in message
    one_command = arguments(saved, saved, pretrained_checkpoint=str(student))
    assert check_beginning(RECIPE, one_command) == []


@pytest.mark.parametrize(
    ("identity", "changes", "whose"),
    [
        (OURS, {"ckpt_step": 20}, None),
        (OTHER, {}, "another injection"),
        (OTHER, {"skip_train": True}, None),
        (OTHER, {"save": None}, None),
        (None, {}, "no injection"),
    ],
)
def test_a_run_saves_over_its_own_checkpoints_alone(tmp_path, identity, changes, whose):
    load, save = tmp_path / "load", tmp_path / "save"
    injected(load, 20)
    if identity is None:
        write_described(save, 60)
    else:
        injected(save, 60, identity)
    args = arguments(load, **{"save": str(save), **changes})
    if whose is None:
        assert check_beginning(RECIPE, args) == []
    else:
        assert f"holds iteration 60 of {whose}" in message_of(lambda: check_beginning(RECIPE, args))


def test_a_student_goes_on_in_its_own_folder_and_is_not_begun_anew_there(tmp_path):
    write_described(tmp_path, 60)
    check_beginning(RECIPE, arguments(tmp_path, tmp_path))
    anew = arguments(tmp_path, tmp_path, finetune=True)
    assert "of no injection" in message_of(lambda: check_beginning(RECIPE, anew))


def test_earlier_iterations_of_another_are_not_saved_over(tmp_path):
    load, save = tmp_path / "load", tmp_path / "save"
    injected(load, 60)
    injected(save, 20, OTHER)
    assert check_beginning(RECIPE, arguments(load, save)) == []


def test_what_changed_in_the_recipe_is_told(tmp_path):
    injected(tmp_path, 20, **{VALUES: recipe_values(RECIPE)})
    args = arguments(tmp_path)
    assert check_beginning(RECIPE, args) == []
    changes = {
        "teachers.coder.source": "megatron:/ckpt/other",
        "objective.alpha": 0.5,
        "retention": {"l2": 0.1},
        "verify_frozen": True,
        "mixing": {},
    }
    (remark,) = check_beginning(recipe_from_yaml(text_with(changes)), args)
    assert remark == (
        "recipe differs from that of iteration 20 in teachers.coder.source, objective.alpha, "
        "retention.l2"
    )


def test_experts_that_are_still_to_be_chosen_are_not_compared(tmp_path):
    injected(tmp_path, 20, **{VALUES: recipe_values(RECIPE)})
    choice = {"profile": "later.json", "method": "token", "threshold": 0.2}
    later = recipe_from_yaml(text_with({"domains.0.experts": choice, "objective.beta": 0.5}))
    (remark,) = check_beginning(later, arguments(tmp_path))
    assert remark.endswith("in objective.beta")


def run_of(kind, args):
    return SimpleNamespace(kind=kind, args=args, recipe=RECIPE, warnings=[])


def test_checkpoints_to_come_know_the_recipe(tmp_path):
    write_described(tmp_path, 60)
    run = run_of(INJECTION, arguments(tmp_path))
    BeginningFeature().start(run)
    assert vars(run.args)[VALUES] == recipe_values(RECIPE)
    assert "is of no injection" in run.warnings[0]
    assert not run.args.no_load_optim


@pytest.mark.parametrize("kind", [EVALUATION, PROFILE])
def test_a_run_that_only_evaluates_asks_for_weights_alone(kind):
    run = run_of(kind, arguments())
    BeginningFeature().start(run)
    assert run.args.no_load_optim
    assert run.args.no_load_rng


def test_a_plan_wants_the_student_that_is_named():
    def plan(**given):
        return BeginningFeature().foresee(RECIPE, facts(), arguments(**given))

    assert "holds no checkpoint" in message_of(lambda: plan(load="/typo/student"))
    assert plan()[0].startswith("no --load: training needs the student")
    assert plan(load="/typo/student", inject_from_scratch=True) == []
