"""Shares of the blend through the real ``pretrain()``."""

import numpy as np
import pytest

from megatron_moe_inject.evaluation.evaluation_file import read_evaluation, read_list
from megatron_moe_inject.experts.choose.profile_file import read_profile
from tests.harness import lane
from tests.harness.injection import OTHER, RECIPE, TERMS, inject, recipe_file
from tests.harness.material import EVALUATES, make_material, student_flags

MIXED = RECIPE + "mixing: {{general: 0.4}}\n"
FALLING = RECIPE + "mixing: {{general: {{points: {{0: 0.75, 3: 0.0}}}}}}\n"
"""Of batches of 8 samples 6, 4, 2 and none."""


@pytest.fixture(scope="module")
def weighted(material):
    """The same blend, its weights on the command line."""
    return inject(material)


def test_a_blend_without_weights_trains_as_one_with_them(material, weighted):
    plain = ("--data-path", material.general, material.domain, "--split", "90,5,5")
    run = inject(material, MIXED, extra=plain)
    assert run.losses("total loss") == pytest.approx(weighted.losses("total loss"), rel=2e-5)
    for step in run.iterations:
        assert step["data share/code"] + step["data share/general"] == pytest.approx(1, rel=1e-5)
    assert 0.2 < sum(run.losses("data share/general")) / 4 < 0.6
    assert "data share/code" not in weighted.iterations[0]


def test_weights_of_another_share_are_an_error(material):
    run = inject(material, MIXED.replace("0.4", "0.1"), check=False)
    assert run.returncode == 2
    assert "mixing: general has 40.0% of the training blend, but 10.0% is asked for" in run.output


def without_weights(material):
    return ("--data-path", material.general, material.domain, "--split", "90,5,5")


def test_alone_an_evaluation_reads_what_it_reads_beside_training(material, tmp_path):
    measured = (*without_weights(material), "--eval-iters", "2")
    keep = ("--save", str(tmp_path / "run"), "--save-interval", "100", "--eval-interval", "4")
    inject(material, MIXED + "evaluation: {{}}\n", extra=(*measured, *keep))
    beside = read_list(tmp_path / "run" / "inject_evaluation.jsonl")[0]
    alone = {}
    for name, recipe in (("mixed", MIXED), ("as they come", RECIPE)):
        path = tmp_path / f"{name}.json"
        ours = ("--inject-recipe", recipe_file(material, recipe), "--inject-evaluate", str(path))
        lane.run(student_flags(*measured, "--load", material.student, "--skip-train", *ours))
        alone[name] = read_evaluation(path)
    assert alone["mixed"].text() == beside.text() != alone["as they come"].text()


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_profile_alone_reads_the_blend_with_its_weights(material, tmp_path, nproc):
    found = {}
    for name, blend, recipe in (
        ("given", material.blend, RECIPE),
        ("mixed", without_weights(material), MIXED),
        ("none", without_weights(material), RECIPE),
    ):
        path = tmp_path / f"{name}.json"
        ours = ("--inject-recipe", recipe_file(material, recipe), "--inject-profile", str(path))
        only = ("--load", material.student, "--skip-train", "--eval-iters", "3")
        lane.run(student_flags(*blend, *only, *ours, pp=nproc), nproc=nproc)
        classes = read_profile(path).classes
        found[name] = {kind: own.tokens.tolist() for kind, own in classes.items()}
    assert found["mixed"] == found["given"] != found["none"]


@pytest.fixture(scope="module")
def falling(material):
    return inject(material, FALLING, extra=without_weights(material))


def test_the_shares_of_each_step_are_those_of_the_schedule(falling):
    assert falling.losses("data share/general") == pytest.approx([0.75, 0.5, 0.25, 0], abs=1e-6)
    assert falling.losses("data share/code") == pytest.approx([0.25, 0.5, 0.75, 1], abs=1e-6)
    assert "linear(0: 0.75, 3: 0)" in falling.output


LAYOUTS = {
    "worker": dict(extra=("--num-workers", "1")),
    "dp4": dict(nproc=4),
    "cp2-dp2": dict(nproc=4, cp=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_curve_of_a_schedule_does_not_depend_on_the_layout(material, falling, layout):
    layout = dict(layout)
    extra = (*without_weights(material), *layout.pop("extra", ()))
    run = inject(material, FALLING, extra=extra, **layout)
    for term in (*TERMS, "data share/general", "load_balancing_loss"):
        assert run.losses(term) == lane.approx(falling.losses(term), rel=2e-5, abs=1e-7), term


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_script_of_the_site_gets_the_schedule_too(material, falling, tp):
    """Its own datasets, which only the first tensor-parallel rank builds."""
    ours = ("--inject-recipe", recipe_file(material, FALLING), *without_weights(material))
    run = lane.run(material.flags(*ours, tp=tp), nproc=2, script=lane.MINIMAL_GPT)
    for term in TERMS:
        assert run.losses(term) == lane.approx(falling.losses(term), rel=2e-5), term


@pytest.mark.slow
def test_validation_reads_what_it_reads_without_an_order_of_training(material):
    """The blend has the means as weights either way, and the student has not been trained."""
    means = ("--data-path", "0.375", material.general, "0.625", material.domain)
    often = ("--train-iters", "1", "--eval-iters", "4", "--lr", "0")
    of_one = FALLING.replace("0: 0.75, 3: 0.0", "0: 0.375")
    scheduled = inject(material, of_one, extra=(*means, *often))
    stock = inject(material, extra=(*means, *often))
    assert len(scheduled.evaluations) == len(stock.evaluations) > 0
    for ours, theirs in zip(scheduled.evaluations, stock.evaluations, strict=True):
        assert theirs.items() <= ours.items()
    assert scheduled.iterations[0]["data share/general"] == pytest.approx(3 / 8, abs=1e-6)


def test_evaluations_beside_training_leave_the_order_alone(material, falling, tmp_path):
    """They notice the validation set among the same datasets."""
    measured = ("--inject-set", f"evaluation={{file: {tmp_path / 'found.jsonl'}, gate: false}}")
    measured += EVALUATES
    run = inject(material, FALLING, extra=(*without_weights(material), *measured))
    for term in (*TERMS, "data share/general"):
        assert run.losses(term) == falling.losses(term), term
    assert len((tmp_path / "found.jsonl").read_text().splitlines()) == 2


def resume(material, save, nproc, extra=()):
    ours = ("--inject-recipe", recipe_file(material, FALLING), "--load", save)
    flags = student_flags(*without_weights(material), "--train-iters", "4", *ours, *extra)
    return lane.run(flags, nproc=nproc, check=not extra)


@pytest.fixture(scope="module")
def half(material):
    """The folder of a run that was stopped after 2 of 4 steps."""
    save = str(material.folder / "scheduled")
    keep = ("--save", save, "--save-interval", "2", "--exit-interval", "2")
    inject(material, FALLING, extra=(*without_weights(material), *keep))
    return save


def test_a_resumed_run_goes_on_with_the_order_it_would_have_had(material, falling, half):
    resumed = resume(material, half, nproc=1)
    for term in (*TERMS, "data share/general"):
        assert resumed.losses(term) == falling.losses(term)[2:], term
    wider = resume(material, half, nproc=2)
    for term in (*TERMS, "data share/general"):
        assert wider.losses(term) == lane.approx(falling.losses(term)[2:], rel=2e-5), term


def test_batches_of_another_size_than_before_are_an_error_on_every_rank(material, half):
    """Tensor-parallel ranks that read no data hear of it from the one that does."""
    smaller = ("--global-batch-size", "4", "--override-opt-param-scheduler")
    layout = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
    run = resume(material, half, nproc=2, extra=(*smaller, *layout))
    assert run.returncode == 2
    message = (
        "the checkpoint's 2 iterations took 16 samples, but by today's batch sizes they take 8"
    )
    assert run.output.count(message) == 1


def without(flags, *names):
    """``flags`` without these options and their values."""
    drop = {i for i, flag in enumerate(flags) if flag in names}
    return [flag for i, flag in enumerate(flags) if i not in drop and i - 1 not in drop]


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_growing_batches_get_the_share_of_their_iteration(material, nproc):
    recipe = FALLING.replace("0: 0.75, 3: 0.0", "0: 0.75, 6: 0.0")
    ours = ("--inject-recipe", recipe_file(material, recipe), *without_weights(material))
    grows = ("--step-batch-size-schedule", "0:4 512:8", "--train-samples", "32")  # in tokens
    flags = without(material.flags(*ours), "--global-batch-size", "--train-iters")
    run = lane.run([*flags, *grows], nproc=nproc)
    sizes = [4, 4, 4, 4, 8, 8]
    samples = np.multiply(run.losses("data share/general"), sizes)
    assert samples == pytest.approx(np.rint(samples), abs=1e-4)
    due = np.cumsum(np.multiply(sizes, [0.75, 0.625, 0.5, 0.375, 0.25, 0.125]))
    assert np.abs(np.cumsum(samples) - due).max() <= 0.5 + 1e-4
    assert len(run.iterations) == 6


def test_an_iteration_that_is_skipped_takes_its_samples_along(material):
    skip = (*without_weights(material), "--iterations-to-skip", "2")
    run = inject(material, FALLING, extra=skip)
    assert run.losses("iteration") == [1, 3, 4]
    assert run.losses("data share/general") == pytest.approx([0.75, 0.25, 0], abs=1e-6)


def test_weights_that_are_not_the_means_are_an_error(material):
    run = inject(material, FALLING, check=False)
    assert run.returncode == 2
    assert "general has 40.0% of the training blend, but 37.5% is asked for" in run.output


@pytest.mark.slow
def test_loading_indices_when_they_are_needed(material, falling, tmp_path):
    """Megatron can leave reading indices to the loader, which never reads those of the blend."""
    cached = (*without_weights(material), "--data-cache-path", str(tmp_path))
    plain = inject(material, FALLING, extra=cached)
    late = inject(material, FALLING, extra=(*cached, "--dataloader-defer-npy-index-mmap"))
    for term in TERMS:
        assert plain.losses(term) == late.losses(term) == falling.losses(term), term


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no second Megatron-Core")
def test_another_megatron_follows_the_schedule(tmp_path):
    other = make_material(tmp_path, pythonpath=(OTHER,))
    one, two = (
        inject(other, FALLING, extra=without_weights(other), path=(OTHER,), **layout)
        for layout in ({}, dict(nproc=2, tp=2))
    )
    assert one.losses("data share/general") == pytest.approx([0.75, 0.5, 0.25, 0], abs=1e-6)
    for term in TERMS:
        assert two.losses(term) == lane.approx(one.losses(term), rel=2e-5), term
