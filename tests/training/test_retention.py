"""Retention (gamma) through the real ``pretrain()``: the original model on general samples."""

import pytest

from tests.harness import lane
from tests.harness.injection import OTHER, RECIPE, inject, recipe_file
from tests.harness.material import EVALUATES, make_material, student_flags
from tests.harness.training_recipes import EVERYTHING

GAMMA = RECIPE.replace("beta: 0.3", "beta: 0.3, gamma: 2.0")
TERMS = ("lm loss", "kd loss", "retention loss", "total loss", "lm loss/general", "grad norm")


@pytest.fixture(scope="module")
def single(material):
    return inject(material, GAMMA, extra=EVALUATES)


def _shares(step):
    gap = step["lm loss/general"] - step["lm loss/code"]
    domain = (step["lm loss/general"] - step["lm loss"]) / gap
    return domain, 1 - domain


def test_retention_is_zero_at_the_first_step_then_grows_and_adds_up(single):
    losses = single.losses("retention loss")
    assert abs(losses[0]) < 1e-6
    assert min(losses[1:]) > 1e-5
    for step in single.iterations:
        domain, general = _shares(step)
        expected = 0.3 * step["lm loss"] + 0.7 * domain * step["kd loss"]
        expected += 2.0 * general * step["retention loss"]
        assert step["total loss"] == pytest.approx(expected, rel=1e-4)


def test_a_loader_without_masks_gives_the_same(material, single):
    run = inject(material, GAMMA, extra=("--no-create-attention-mask-in-dataloader",))
    for term in TERMS:
        assert run.losses(term) == pytest.approx(single.losses(term), rel=1e-6, abs=1e-9), term


def test_evaluation_reports_it_too(single):
    assert single.evaluations[-1]["retention loss"] > 1e-5


def test_evaluations_may_have_micro_batches_of_another_size(material, single):
    """The original's pass of a training step has training's size, with the model in eval mode."""
    sizes = (*EVALUATES, "--eval-micro-batch-size", "4", "--eval-global-batch-size", "8")
    run = inject(material, GAMMA, nproc=2, tp=2, extra=sizes)
    for term in TERMS:
        assert run.losses(term) == pytest.approx(single.losses(term), rel=2e-5, abs=1e-6), term
    for ours, theirs in zip(run.evaluations, single.evaluations, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("group", ["3", pytest.param("6", marks=pytest.mark.slow)])
def test_groups_of_an_interleaved_schedule_larger_than_the_pipeline(material, group):
    """Twelve micro-batches, of which general samples fill one or two, or about four."""
    steps = ("--global-batch-size", "24", "--train-iters", "6")
    blends = [("0.1", "0.9"), ("0.33", "0.67")]
    for general, domain in blends if group == "3" else blends[1:]:
        blend = ("--data-path", general, material.general, domain, material.domain)
        extra = (*steps, *blend)
        interleaved = (
            *("--num-layers-per-virtual-pipeline-stage", "1"),
            *("--microbatch-group-size-per-virtual-pipeline-stage", group),
        )
        one = inject(material, GAMMA, extra=extra)
        run = inject(material, GAMMA, nproc=2, pp=2, extra=(*extra, *interleaved))
        for term in TERMS:
            expected = lane.approx(one.losses(term), rel=2e-5, abs=1e-6)
            assert run.losses(term) == expected, (term, general)


def test_with_everything_training_the_original_head_and_embedding_are_kept_too(material):
    run = inject(material, EVERYTHING, nproc=2, tp=2)
    losses = run.losses("retention loss")
    assert abs(losses[0]) < 1e-6
    assert min(losses[1:]) > 1e-5


def test_it_holds_general_samples_to_the_original(material):
    """The same run without gamma goes away from the original further."""
    more = ("--train-iters", "12", *lane.ONE_BATCH)
    held = inject(material, GAMMA.replace("2.0}}", "20.0}}"), extra=more)
    watched = inject(material, GAMMA.replace("gamma: 2.0", "gamma: 1.0e-9"), extra=more)
    assert held.losses("retention loss")[-1] < 0.7 * watched.losses("retention loss")[-1]


def test_a_vanishing_gamma_changes_nothing_else(material):
    """The pass of the original leaves no trace: its weight is what acts, not its running."""
    router = (*lane.DEEPSEEK_ROUTER, "--moe-router-topk", "1", "--mtp-num-layers", "1", "--bf16")
    watched = GAMMA.replace("gamma: 2.0", "gamma: {{points: {{100: 0.0, 200: 1.0}}}}")
    start = ("--train-iters", "4", "--inject-from-scratch")
    fresh = student_flags(*material.blend, *start, *router, ep=2)
    runs = [
        lane.run([*fresh, "--inject-recipe", recipe_file(material, recipe)], nproc=2)
        for recipe in (RECIPE, watched)
    ]
    for term in ("lm loss", "kd loss", "total loss", "grad norm"):
        assert runs[0].losses(term) == runs[1].losses(term), term
    assert runs[1].losses("retention loss")[-1] > 0


@pytest.mark.parametrize(
    "layout", [dict(tp=2), pytest.param(dict(pp=2), marks=pytest.mark.slow)], ids=str
)
def test_the_stored_original_is_read_at_another_layout(material, tmp_path, layout):
    """The next step's loss is a function of the weights alone, so the optimizer may start anew."""
    save = str(tmp_path / "resumed")
    keep = ("--train-iters", "6", "--save", save, "--save-interval", "3")
    whole = inject(material, GAMMA, nproc=2, ep=2, extra=("--train-iters", "6"))
    inject(material, GAMMA, nproc=2, ep=2, extra=(*keep, "--exit-interval", "3"))
    ours = ("--inject-recipe", recipe_file(material, GAMMA), "--load", save, "--no-load-optim")
    flags = student_flags(*material.blend, *keep, *ours, "--no-load-rng", **layout)
    resumed = lane.run(flags, nproc=2)
    for term in ("lm loss", "kd loss", "retention loss", "total loss"):
        assert resumed.losses(term)[0] == pytest.approx(whole.losses(term)[3], rel=2e-5), term


def test_a_run_that_goes_on_from_a_checkpoint_without_an_original_says_what_it_takes(material):
    """The student's own checkpoint, its iterations counted on."""
    ours = ("--inject-recipe", recipe_file(material, GAMMA), "--load", material.student)
    run = lane.run(
        student_flags(*material.blend, *ours, "--no-load-optim", "--train-iters", "4"),
    )
    assert "iter_0000003 is of no injection, so the original is the model as loaded" in run.output
    assert abs(run.losses("retention loss")[0]) < 1e-6


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no second Megatron-Core")
def test_the_other_supported_megatron_gives_the_same_curve(tmp_path, single):
    material = make_material(tmp_path, [OTHER])
    run = inject(material, GAMMA, nproc=2, ep=2, path=[OTHER])
    for term in TERMS:
        assert run.losses(term) == pytest.approx(single.losses(term), rel=2e-5, abs=1e-6), term


def test_a_resumed_run_that_trains_something_else_is_told(material, tmp_path):
    save = str(tmp_path / "resumed")
    keep = ("--train-iters", "6", "--save", save, "--save-interval", "3")
    inject(material, GAMMA, extra=(*keep, "--exit-interval", "3"))
    other = ("--inject-recipe", recipe_file(material, GAMMA), "--load", save, "--no-load-optim")
    other += ("--inject-set", "train.norms=true")
    run = lane.run(student_flags(*material.blend, *keep, *other), check=False)
    assert run.returncode == 2, run.tail()
    assert "holds the originals of {'experts'" in run.output
    assert "Traceback" not in run.output


def test_without_general_data_it_is_refused(material):
    only = ("--data-path", material.domain, "--inject-set", "domains[0].data=[0]")
    run = inject(material, GAMMA, extra=only, check=False)
    assert run.returncode == 2, run.tail()
    assert "objective.gamma: 2.0 weighs retention on general data" in run.output
