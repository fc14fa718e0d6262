"""A hybrid student beside a GPT student of the same weights, and what one takes of the other."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_moe_inject.cli import main
from megatron_moe_inject.experts.choose.profile_file import read_profile
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from tests.harness import lane
from tests.harness.checkpoints import whole
from tests.harness.grouped import SCRIPT
from tests.harness.injection import PROVEN, assert_clean_end, recipe_file
from tests.harness.material import student_flags

HYBRID = ("--hybrid-layer-pattern", "*E*E*E*E")
TWO_STAGES = ("--hybrid-layer-pattern", "*E*E|*E*E")
RECIPE = """
layer_numbers: gpt
domains:
  - name: code
    data: [1]
    teacher: coder
    experts: {{layers: {{1: [2], 2: [0, 3], 3: [3]}}}}
teachers:
  coder: {{source: "megatron:{teacher}", layers: {{1: 0, 3: 1}}}}
objective: {{alpha: 0.7, beta: 0.3, gamma: 2.0}}
imitation: {{hidden: 0.2}}
steering: {{coeff: 0.5, target_mass: 0.8, balance: 0.1, layers: [2, 3]}}
train: {{router: true, patterns: ["*.layers.1.pre_mlp_layernorm.weight"]}}
"""
EXPERTS = "decoder.layers.{}mlp.experts.experts.linear_fc1.weight"
MOE_LAYERS = [1, 3, 5, 7]
CLOCK = "elapsed time per iteration (ms)"


def run(material, *flags, recipe=RECIPE, goes_on=None, nproc=1, check=True, **layout):
    """An injection from the material's GPT checkpoint, or one that goes on from a folder."""
    more = ("--inject-recipe", recipe_file(material, recipe), "--inject-verify-frozen", *flags)
    if goes_on is None:
        started = material.flags(*more, **layout)
    else:
        loaded = ("--load", str(goes_on), "--train-iters", "4")
        started = student_flags(*material.blend, *loaded, *more, **layout)
    return lane.run(started, nproc=nproc, check=check)


def assert_same(run, other, rel=0.0):
    """Each number of each iteration, all but the clock."""
    assert len(run.iterations) == len(other.iterations) > 0
    for ours, theirs in zip(run.iterations, other.iterations, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs.keys() - {CLOCK}:
            assert ours[name] == pytest.approx(theirs[name], rel=rel, abs=rel / 10), name


@pytest.fixture(scope="module")
def gpt(material):
    return run(material, "--train-iters", "5")


def test_a_recipe_in_gpt_blocks_trains_the_same_as_a_gpt_model(material, gpt):
    hybrid = run(material, *HYBRID, "--train-iters", "5")
    assert len(hybrid.iterations) == 5
    assert "imitation loss" in hybrid.iterations[-1]
    assert_same(hybrid, gpt)
    assert PROVEN.search(hybrid.output)


def test_a_stage_may_begin_at_an_expert_layer(material, gpt):
    uneven = ("--hybrid-layer-pattern", "*E*|E*E*E", "--train-iters", "5")
    assert_same(run(material, *uneven, nproc=2, pp=2), gpt, rel=2e-5)


@pytest.fixture(scope="module")
def stopped(material, tmp_path_factory):
    """A GPT injection that was stopped in its middle, and the whole one."""
    folder = tmp_path_factory.mktemp("gpt") / "saved"
    keep = ("--save", str(folder), "--save-interval", "2")
    return folder, run(material, *keep, "--exit-interval", "2"), run(material)


@pytest.mark.parametrize(
    ("flags", "nproc", "layout"),
    [(HYBRID, 1, {}), (TWO_STAGES, 2, {"pp": 2})],
    ids=["one process", "pp2"],
)
def test_an_injection_goes_on_as_a_hybrid_model(material, stopped, tmp_path, flags, nproc, layout):
    """With optimizer state, originals and numbers of steps: as if nothing had happened."""
    folder, _, whole_run = stopped
    taken = tmp_path / "taken"
    shutil.copytree(folder, taken)
    on = run(
        material, *flags, "--save", str(taken), "--save-interval", "2",
        goes_on=taken, nproc=nproc, **layout,
    )  # fmt: skip
    assert [step["iteration"] for step in on.iterations] == [3, 4]
    rel = 0.0 if nproc == 1 else 2e-5
    for ours, theirs in zip(on.iterations, whole_run.iterations[2:], strict=True):
        again = {"load_balancing_loss"} if theirs["iteration"] == 4 else set()
        for name in theirs.keys() - {CLOCK} - again:  # whose second line has the first one's sum
            assert ours[name] == pytest.approx(theirs[name], rel=rel, abs=rel / 10), name


def test_deltas_go_between_both(material, tmp_path):
    """What a hybrid run changed, as a delta of its GPT start, on the start and on the run's own."""
    saved, delta, applied = tmp_path / "saved", tmp_path / "delta", tmp_path / "applied"
    run(material, *HYBRID, "--save", str(saved), "--save-interval", "4")
    start = ["--base", material.student]
    assert main(["export-delta", *start, "--trained", str(saved), "--output", str(delta)]) == 0
    assert main(["apply-delta", *start, "--delta", str(delta), "--output", str(applied)]) == 0
    gpt, hybrid, base = (
        CheckpointPlace("--base", Path(folder)).open()
        for folder in (applied, saved, material.student)
    )
    stacked = whole(gpt, EXPERTS.format(""))
    for block, layer in enumerate(MOE_LAYERS):
        assert torch.equal(stacked[block], whole(hybrid, EXPERTS.format(f"{layer}.")))
    changed = (stacked != whole(base, EXPERTS.format(""))).flatten(2).any(-1)
    assert changed.nonzero().tolist() == [[1, 2], [2, 0], [2, 3], [3, 3]]
    norms = [f"decoder.{name}.weight" for name in ("final_layernorm", "final_norm")]
    assert torch.equal(whole(gpt, norms[0]), whole(hybrid, norms[1]))


def test_a_delta_of_a_gpt_run_applies_to_a_hybrid_model(material, tmp_path):
    gpt, hybrid, delta, applied = (tmp_path / name for name in ("gpt", "hybrid", "delta", "out"))
    save = ("--save-interval", "4", "--save")
    run(material, *save, str(gpt))
    run(material, *HYBRID, *save, str(hybrid), "--lr", "0", "--weight-decay", "0")
    base = ["--base", material.student]
    assert main(["export-delta", *base, "--trained", str(gpt), "--output", str(delta)]) == 0
    base = ["--base", str(hybrid)]
    assert main(["apply-delta", *base, "--delta", str(delta), "--output", str(applied)]) == 0
    ours, theirs = (CheckpointPlace("--base", folder).open() for folder in (applied, gpt))
    stacked = whole(theirs, EXPERTS.format(""))
    for block, layer in enumerate(MOE_LAYERS):
        assert torch.equal(stacked[block], whole(ours, EXPERTS.format(f"{layer}.")))


@pytest.fixture(scope="module")
def profiles(material, tmp_path_factory):
    """Of the same tokens, by a GPT run and a hybrid run."""
    folder = tmp_path_factory.mktemp("profiles")
    files = folder / "gpt.json", folder / "hybrid.json"
    for file, flags in zip(files, ((), HYBRID), strict=True):
        run(material, *flags, "--skip-train", "--eval-iters", "2", "--inject-profile", str(file))
    return files


def test_profiles_count_the_same(profiles):
    gpt, hybrid = map(read_profile, profiles)
    assert gpt.provenance.hybrid_layer_pattern is None
    assert gpt.provenance.moe_layers == [0, 1, 2, 3]
    assert hybrid.provenance.hybrid_layer_pattern == HYBRID[1]
    assert hybrid.provenance.moe_layers == MOE_LAYERS
    assert gpt.classes.keys() == hybrid.classes.keys()
    for name, counts in gpt.classes.items():
        assert np.array_equal(counts.selections, hybrid.classes[name].selections)
        assert counts.selections.sum() > 0


BY_PROFILE = """
domains:
  - name: code
    data: [1]
    teacher: coder
    experts: {{profile: "PROFILE", method: top_n, n: 1, only_layers: LAYERS}}
teachers:
  coder: {{source: "megatron:{teacher}"}}
objective: {{alpha: 0.7, beta: 0.3}}
"""


def test_a_profile_of_either_chooses_the_same_experts(material, profiles):
    def chosen(file, flags, layers, numbers):
        text = BY_PROFILE.replace("PROFILE", str(file)).replace("LAYERS", layers)
        return run(material, *flags, "--train-iters", "2", recipe=numbers + text)

    of_gpt, of_hybrid = profiles
    expected = chosen(of_gpt, (), "[1, 3]", "")
    assert_same(chosen(of_gpt, HYBRID, "[1, 3]", "layer_numbers: gpt\n"), expected)
    assert_same(chosen(of_gpt, HYBRID, "[3, 7]", "layer_numbers: hybrid\n"), expected)
    assert_same(chosen(of_hybrid, (), "[1, 3]", ""), expected)


def test_multi_token_prediction_is_told_apart(material):
    """Its own calls of the output layer and of the loss stay stock's, in front of ours. (Its layers
    are two modules instead of one, so that gradients are summed up in another order, of which Adam
    would make more than rounding where they are small. The rate is so high that the original's
    divergence is far above its rounding.)"""
    scratch = ("--inject-from-scratch", "--train-iters", "3", "--optimizer", "sgd", "--lr", "30")
    text = recipe_file(material, RECIPE)

    def trained(*flags, nproc=1, **layout):
        given = student_flags(*material.blend, *scratch, "--inject-recipe", text, *flags, **layout)
        return lane.run(given, nproc=nproc)

    gpt = trained("--mtp-num-layers", "1")
    hybrid = trained("--hybrid-layer-pattern", "*E*E*E*E/*E")
    counted = {CLOCK, "load_balancing_loss"}  # of which Megatron divides a hybrid's by its E alone
    assert hybrid.iterations[0]["lm loss"] == gpt.iterations[0]["lm loss"]
    for ours, theirs in zip(hybrid.iterations, gpt.iterations, strict=True):
        assert ours.keys() == theirs.keys()
        assert theirs["mtp_1 loss"] > 1
        for name in theirs.keys() - counted:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5), name


FROZEN_FP8 = """
layer_numbers: gpt
domains:
  - {{name: code, data: [1], teacher: coder}}
teachers:
  coder: {{source: "megatron:{teacher}"}}
objective: {{alpha: 0.7, beta: 0.3}}
train: {{experts: none, frozen_experts: fp8, patterns: ["decoder.layers.2.mlp.experts.0.*"]}}
"""


def test_experts_of_prediction_are_not_put_into_fp8(material, tmp_path):
    """Those of the decoder are, but for the one that a name in a GPT model lets train."""
    text = recipe_file(material, FROZEN_FP8)
    scratch = ("--inject-from-scratch", "--train-iters", "2", "--moe-grouped-gemm")
    saved = []
    for flags in (("--mtp-num-layers", "1"), ("--hybrid-layer-pattern", "*E*E*E*E/*E")):
        folder = tmp_path / str(len(saved))
        save = ("--save", str(folder), "--save-interval", "2", "--inject-recipe", text)
        given = student_flags(*material.blend, *scratch, *save, *flags)
        run = lane.run(given, script=SCRIPT, env={"TESTS_FP8_PRODUCTS": "1"})
        assert run.losses("mtp_1 loss")[-1] > 1
        saved.append(CheckpointPlace("--base", folder).open())
    gpt, hybrid = saved
    stacked = whole(gpt, EXPERTS.format(""))
    for block, layer in enumerate(MOE_LAYERS):
        assert torch.equal(stacked[block], whole(hybrid, EXPERTS.format(f"{layer}.")))
    (ours,), (theirs,) = (
        [name for name in held.tensors if name.startswith("mtp.") and "experts.linear_fc1" in name]
        for held in (hybrid, gpt)
    )
    assert torch.equal(whole(hybrid, ours).flatten(), whole(gpt, theirs).flatten())


NUMBERED = RECIPE.replace("layer_numbers: gpt", "layer_numbers: hybrid")
MISTAKES = {
    "an attention layer": (
        HYBRID, NUMBERED.replace("{{1: [2],", "{{2: [2],"),
        ("experts.layers.2: 2 is an attention layer", "MoE layers: 1, 3, 5, 7 (nearest 1, 3)"),
    ),
    "no numbers": (
        HYBRID, RECIPE.replace("layer_numbers: gpt", ""),
        ("layer_numbers: missing, and domains[0].experts.layers.1", "block 1 = layers 2 and 3"),
    ),
    "a block too many": (
        HYBRID, RECIPE.replace("3: [3]}}}}", "4: [3]}}}}").replace("[2, 3]", "[2]"),
        ("experts.layers.4: 4 is no block of the student", "block 3 = layers 6 and 7"),
    ),
    "blocks of what has none": (
        ("--hybrid-layer-pattern", "*E-E"), RECIPE,
        ("layer_numbers: 'gpt' counts blocks", "do not take turns in *E-E"),
    ),
    "no experts": (
        ("--hybrid-layer-pattern", "*-*-*-*-"), RECIPE, ("'*-*-*-*-' has no layer of experts (E)",),
    ),
    "a GPT student": ((), NUMBERED, ("layer_numbers: 'hybrid'", "write gpt")),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_key_value_and_remedy(material, mistake):
    flags, recipe, fragments = MISTAKES[mistake]
    assert_clean_end(run(material, *flags, recipe=recipe, check=False), fragments)


def test_a_stage_without_experts_is_refused(material):
    """For which Megatron 0.18 and 0.19 wait for ever once they log balance losses."""
    flags = ("--hybrid-layer-pattern", "*|E*E*E*E")
    ended = run(material, *flags, nproc=2, pp=2, check=False)
    assert_clean_end(ended, ("gives pipeline stage 0 no layer of experts", "move a |"))
    unbalanced = ("--moe-router-load-balancing-type", "none", "--train-iters", "2")
    recipe = RECIPE.replace(", balance: 0.1", "")
    two = run(material, *flags, *unbalanced, recipe=recipe, nproc=2, pp=2)
    one = run(material, *HYBRID, *unbalanced, recipe=recipe)
    assert_same(two, one, rel=2e-5)
