"""Runs that only evaluate, evaluations side by side, and the logits of a stock run."""

import numpy as np
import pytest
import torch

from megatron_moe_inject.evaluation.evaluation_file import (
    read_evaluation,
)
from tests.harness import lane
from tests.harness.injection import RECIPE, recipe_file
from tests.harness.material import student_flags

MEASURED = RECIPE + "evaluation: {{}}\n"
GAMMA = MEASURED.replace("beta: 0.3", "beta: 0.3, gamma: 2.0")
PLAIN = (str(lane.HARNESS / "plain_logits.py"),)
BATCHES = 3
EVALUATIONS = ("--eval-iters", str(BATCHES), "--eval-interval", "2")


def evaluate(material, path, *extra, nproc=1, recipe=RECIPE, load=None, **layout):
    """A run that only evaluates."""
    flags = student_flags(
        *material.blend,
        *("--load", load or material.student, "--skip-train", "--eval-iters", str(BATCHES)),
        *("--inject-recipe", recipe_file(material, recipe), "--inject-evaluate", str(path)),
        *extra,
        **layout,
    )
    run = lane.run(flags, nproc=nproc)
    assert "evaluation: written to" in run.output, run.tail()
    return read_evaluation(path)


def assert_same(found, expected, rtol=2e-5):
    assert found.text() == expected.text()
    assert found.classes.keys() == expected.classes.keys()
    for name, ours in found.classes.items():
        theirs = expected.classes[name]
        assert ours.sequences == theirs.sequences
        assert ours.sums.keys() == theirs.sums.keys(), name
        for key, values in ours.sums.items():
            if key in ("correct", "agreement"):  # a near tie may fall the other way
                assert np.abs(values - theirs.sums[key]).sum() <= 2, (name, key)
                continue
            atol = 2e-5 * ours.sums["tokens"].max()
            np.testing.assert_allclose(
                values, theirs.sums[key], rtol, atol, err_msg=f"{name} {key}"
            )
        assert ours.calibration_error() == pytest.approx(theirs.calibration_error(), abs=5e-3)


def plain(material, path, flags):
    """Logits and data of a stock run that evaluates on the same data."""
    lane.run(
        [*flags, *material.blend, "--skip-train", "--eval-iters", str(BATCHES)],
        script=PLAIN,
        env={"PLAIN_LOGITS": str(path)},
    )
    found = torch.load(path)
    return {name: value[: BATCHES * 8] for name, value in found.items()}  # the rest is test data
