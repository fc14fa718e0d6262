"""Runs of the covering array through the real ``pretrain()``, and what is compared of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_moe_inject.evaluation.evaluation_file import read_list
from megatron_moe_inject.experts.choose.profile_file import read_profile
from tests.harness import covering_array as array
from tests.harness import lane
from tests.harness.evaluating import assert_same
from tests.harness.grouped import SCRIPT
from tests.harness.injection import PROVEN
from tests.harness.material import student_flags

STEPS = 4
CLOCK = "elapsed time per iteration (ms)"


def run_set(
    material, llama, folder, name, layout=None, *, like=None, flags=(), save=False, load=False
):
    """One run of a set at a layout, on one process without one.

    Args:
        llama: folder of the teacher from Hugging Face.
        folder: what the run writes goes there.
        like: the layout that a run on one process is the reference of.
        flags: further ones.
        save: end after two of four steps, and save to ``folder``.
        load: go on from there.
    """
    own, at = array.SETS[name], array.LAYOUTS[layout] if layout else array.Layout()
    shared = array.LAYOUTS[like or layout] if like or layout else at
    recipe = folder / "recipe.yaml"
    text = array.recipe_of(own, shared.recipe)
    for key, path in (("teacher", material.teacher), ("llama", llama), ("folder", folder)):
        text = text.replace(f"{{{key}}}", str(path))
    recipe.write_text(text)
    start = ("--load", material.student, "--finetune", "--no-load-optim", "--no-load-rng")
    keep = ("--save", str(folder), "--save-interval", "2")
    if load:
        start = ("--load", str(folder), *keep)
    elif save:
        start += (*keep, "--exit-interval", "2")
    return lane.run(
        [
            *student_flags("--train-iters", str(STEPS), *start, *array.blend_of(own, material)),
            *("--inject-recipe", str(recipe), "--inject-verify-frozen"),
            *(*array.flags_of(own, at, folder), *shared.shared, *flags),
        ],
        nproc=at.nproc,
        script=SCRIPT if own.grouped else lane.PRETRAIN,
        # As TE's layer: all weights are rounded, also where a rank has none that is frozen.
        env={"TESTS_FP8_PRODUCTS": "1"} if own.grouped else None,
    )


def reference_of(known_run, name, layout):
    """One process with what the layout shares with it; one run for all layouts that share none."""
    at = array.LAYOUTS[layout]
    return known_run(name, like=layout if at.shared or at.recipe else None)


def assert_same_routing(ours, theirs):
    """Two profiles of the same tokens: not one choice of an expert differs."""
    assert ours.classes.keys() == theirs.classes.keys()
    for name, counts in ours.classes.items():
        expected = theirs.classes[name]
        assert np.array_equal(counts.tokens, expected.tokens), name
        assert np.array_equal(counts.selections, expected.selections), name
        np.testing.assert_allclose(counts.gate_sums, expected.gate_sums, rtol=2e-5)


def assert_same_steps(run, reference, but=()):
    """The same terms in each iteration and evaluation, and each of them the same."""
    assert len(run.iterations) == len(reference.iterations) == STEPS
    assert reference.evaluations
    for kind in ("iterations", "evaluations"):
        for at, (ours, theirs) in enumerate(
            zip(getattr(run, kind), getattr(reference, kind), strict=True), 1
        ):
            assert ours.keys() == theirs.keys()
            for name in sorted(theirs.keys() - {CLOCK, *but}):
                expected = pytest.approx(theirs[name], rel=2e-5, abs=1e-6)
                assert ours[name] == expected, (name, kind, at)


def rows(*names):
    """Layout and set of the rows of these sets, those of slow layouts marked so."""
    return [
        pytest.param(
            layout, name, id=f"{name}: {layout}",
            marks=[pytest.mark.slow] if array.LAYOUTS[layout].slow else [],
        )
        for layout, name in array.ROWS
        if name in names
    ]  # fmt: skip


def resumed(*names):
    """Layout, set and flags of the runs of these sets that are also resumed."""
    return [
        pytest.param(*row, id=", ".join((row[1], row[0], *row[2])))
        for row in array.RESUMED
        if row[1] in names
    ]


def assert_same_evaluations(folder, other, rtol=2e-5):
    """Those beside training, measured at its start, in its middle and at its end."""
    ours, theirs = (read_list(path / "evaluation.jsonl") for path in (folder, other))
    assert [e.provenance.iteration for e in ours] == [0, 2, 4]
    for measured, expected in zip(ours, theirs, strict=True):
        assert_same(measured, expected, rtol=rtol)


def check_row(known_run, layout, name):
    """What a layout gives is what one process gives, and nothing frozen moves."""
    one, one_folder = reference_of(known_run, name, layout)
    run, folder = known_run(name, layout)
    assert_same_routing(*(read_profile(path / "profile.json") for path in (folder, one_folder)))
    assert_same_steps(run, one, but=array.LAYOUTS[layout].differs)
    assert PROVEN.search(run.output)
    assert_same_evaluations(folder, one_folder)


def check_terms(known_run, name):
    """Each feature of a set shows in the log, or has no term of its own."""
    last = known_run(name)[0].iterations[-1]
    features = [array.FEATURES[feature] for feature in array.SETS[name].features]
    terms = {term for feature in features for term in feature.terms}
    assert len(terms) > 8
    for term in terms:
        assert math.isfinite(last[term]), term
        assert last[term] > 0, term


def check_resumed(known_run, stopped_run, layout, name, flags):
    """A run that was stopped after two steps goes on as if nothing had happened, bitwise."""
    whole, folder = known_run(name, layout, flags=flags)
    run, own = stopped_run(name, layout, flags=flags)
    assert [step["iteration"] for step in run.iterations] == [3, 4]
    for ours, theirs in zip(run.iterations, whole.iterations[2:], strict=True):
        assert ours.keys() == theirs.keys()
        again = {"load_balancing_loss"} if theirs["iteration"] == 4 else set()
        for term in theirs.keys() - {CLOCK} - again:  # whose second line has the first one's sum
            assert ours[term] == theirs[term], (term, theirs["iteration"])
    assert PROVEN.search(run.output)
    assert_same_evaluations(own, folder, rtol=0)
