"""Frozen experts in FP8 alone, through the real ``pretrain()``.

Products in FP8 need a GPU (``tests/gpu``). Here stand-ins for TE's grouped linear layers and FP8
tensors multiply by the decoded weights, so that what the plugin does around them shows: which
weights are encoded and when, checkpoints, resume, the proof.
"""

import re

import pytest

from tests.harness import lane
from tests.harness.grouped import GROUPED, SCRIPT, TWO_OF_FOUR, grouped
from tests.harness.injection import TERMS, recipe_file
from tests.harness.material import student_flags

FP8 = ("--inject-set", "train.frozen_experts=fp8")
PRODUCTS = {"TESTS_FP8_PRODUCTS": "1"}
"""Grouped linear layers encode the weights that they multiply by, as under FP8."""


@pytest.fixture(scope="module")
def single(material):
    return grouped(material, *FP8, recipe=TWO_OF_FOUR)


def test_weights_are_rounded_as_where_the_layer_encodes_them_itself(material, single):
    exact, encoding = grouped(material), grouped(material, env=PRODUCTS)
    for term in TERMS:
        assert single.losses(term) != exact.losses(term), term
        assert single.losses(term) == encoding.losses(term), term
    tensors = [int(re.search(r"(\d+) frozen tensors", run.output)[1]) for run in (single, exact)]
    frozen_experts = 4 * 4 - 3
    assert tensors[0] == tensors[1] + 2 * frozen_experts, "scales are proved as well"


@pytest.mark.parametrize("originals", ["device", "host"])
def test_originals_and_what_trains_are_encoded_each_in_its_pass(material, originals):
    retention = ("objective.gamma=5.0", f"retention.originals={originals}")
    run = grouped(material, *FP8, *retention)
    encoding = grouped(material, "--inject-set", *retention, env=PRODUCTS)
    assert run.losses("retention loss")[-1] > 0
    for term in (*TERMS, "retention loss"):
        assert run.losses(term) == encoding.losses(term), term


def test_a_checkpoint_holds_what_was_computed_with(material, tmp_path):
    """Resumed in FP8 and, from the same files, with plain parameters that are encoded when they are
    used: both go on bitwise."""
    recipe = ("--inject-recipe", recipe_file(material, TWO_OF_FOUR), *GROUPED)
    longer = ("--train-iters", "6")
    whole = grouped(material, *FP8, *longer, nproc=2, ep=2)
    save = ("--save", str(tmp_path / "half"), "--save-interval", "3")
    flags = material.flags(*recipe, *FP8, *longer, *save, "--exit-interval", "3", ep=2)
    lane.run(flags, nproc=2, script=SCRIPT)
    load = ("--load", str(tmp_path / "half"))
    for own in (FP8, ()):
        on = student_flags(*material.blend, *recipe, *own, *longer, *load, ep=2)
        resumed = lane.run(on, nproc=2, script=SCRIPT, env={} if own else PRODUCTS)
        for term in TERMS:
            assert resumed.losses(term) == whole.losses(term)[3:], (term, own)
