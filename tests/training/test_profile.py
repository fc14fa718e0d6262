"""Routing profiles recorded through the real ``pretrain()``."""

import numpy as np
import pytest

from megatron_moe_inject.experts.choose.profile_file import read_profile
from megatron_moe_inject.experts.choose.router_logits import read_logits
from tests.harness import lane
from tests.harness.injection import LAYOUTS, RECIPE, inject, recipe_file
from tests.harness.material import student_flags

CHOSEN = "{{layers: {{2: [3], 3: [3]}}}}"
BY_PROFILE = "{{{{profile: {}, method: token, threshold: 0.3}}}}"
UNKNOWN = RECIPE.replace(CHOSEN, BY_PROFILE.format("not-yet.json"))
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def record(material, path, *extra, nproc=1, recipe=UNKNOWN, **layout):
    """A run that only evaluates, with the experts still to be chosen by what it writes."""
    flags = student_flags(
        *material.blend,
        *("--load", material.student, "--skip-train", "--eval-iters", "3"),
        *("--inject-recipe", recipe_file(material, recipe)),
        *("--inject-profile", str(path), "--inject-profile-coselections", *extra),
        **layout,
    )
    run = lane.run(flags, nproc=nproc)
    assert "routing profile: general" in run.output, run.tail()
    return read_profile(path)


def assert_same(found, expected):
    assert found.provenance.checkpoint_sha256 == expected.provenance.checkpoint_sha256
    assert found.classes.keys() == expected.classes.keys()
    for name, ours in found.classes.items():
        theirs = expected.classes[name]
        for field in ("tokens", "selections", "coselections"):
            assert np.array_equal(getattr(ours, field), getattr(theirs, field)), (name, field)
        for field in ("gate_sums", "prob_sums"):
            np.testing.assert_allclose(getattr(ours, field), getattr(theirs, field), rtol=1e-5)
        assert ours.spread.sequences == theirs.spread.sequences
        np.testing.assert_allclose(ours.spread.share_sums, theirs.spread.share_sums, rtol=1e-6)
        np.testing.assert_allclose(
            ours.spread.share_squares, theirs.spread.share_squares, rtol=1e-6
        )


@pytest.fixture(scope="module")
def single(material, tmp_path_factory):
    return record(material, tmp_path_factory.mktemp("profile") / "one.json", "--finetune")


def test_it_counts_every_token_of_every_class(single, material):
    assert single.provenance.moe_layers == [0, 1, 2, 3]
    found = single.provenance
    assert (found.checkpoint, found.checkpoint_iteration) == (material.student, 3)
    assert found.first_iteration == found.last_iteration == 3, "the student's own"
    assert len(found.checkpoint_sha256) == 64
    assert set(single.classes) == {"general", "code"}
    assert single.classes["code"].data == (material.domain,)
    sequences = sum(found.spread.sequences for found in single.classes.values())
    assert sequences == 2 * 3 * 8  # validation and test, three steps of eight samples
    for found in single.classes.values():
        assert (found.tokens == 32 * found.spread.sequences).all()
        assert found.selections.min() >= 0
    code, general = (single.classes[name].selection_share() for name in ("code", "general"))
    assert not np.allclose(code, general, atol=0.01)
    assert single.provenance.expert_parameters == 3 * 32 * 64


@pytest.fixture(scope="module")
def sampled(material, tmp_path_factory):
    path = tmp_path_factory.mktemp("logits") / "one.json"
    return read_logits(path, record(material, path, "--inject-profile-logits", "70"))


def assert_same_sample(found, expected):
    assert found.keys() == expected.keys()
    for name, ours in found.items():
        for field in ("chosen", "sequences", "positions"):
            assert np.array_equal(getattr(ours, field), getattr(expected[name], field)), field
        np.testing.assert_allclose(ours.logits, expected[name].logits, rtol=1e-4, atol=1e-6)


def test_sampled_logits_are_those_that_chose(sampled, single):
    for name, sample in sampled.items():
        assert sample.logits.shape == (4, 64, 4)  # eight tokens each of eight sequences
        best = np.argsort(-sample.logits, axis=-1)[..., :2]
        assert np.take_along_axis(sample.chosen, best, -1).all()
        assert (sample.chosen.sum(-1) == 2).all()
        assert sorted(set(sample.positions)) == [2, 6, 10, 14, 18, 22, 26, 30]
        assert len(set(sample.sequences)) == 8
        assert len(np.unique(sample.logits)) > 0.9 * sample.logits.size, name
    code, general = (set(sampled[name].sequences) for name in ("code", "general"))
    assert not code & general
    assert max(code | general) < sum(found.spread.sequences for found in single.classes.values())


@pytest.mark.parametrize(
    "layout",
    [
        *("ep2", "pp2-vpp2"),
        *(pytest.param(at, marks=pytest.mark.slow) for at in ("tp2-sp", "pp2", "cp2")),
    ],
)
def test_counts_and_sampled_logits_do_not_depend_on_the_layout(
    material, single, sampled, tmp_path, layout
):
    options = dict(LAYOUTS[layout])
    path = tmp_path / "p.json"
    flags = ("--inject-profile-logits", "70", *options.pop("extra", ()))
    found = record(material, path, *flags, **options)
    assert found.logits.tokens == {"general": 64, "code": 64}
    assert_same(found, single)
    assert_same_sample(read_logits(path, found), sampled)


def test_the_run_without_a_profile_gives_the_same_losses(material, tmp_path):
    flags = student_flags(
        *material.blend, "--load", material.student, "--skip-train", "--eval-iters", "3"
    )
    plain = lane.run(flags)
    ours = ("--inject-recipe", recipe_file(material, UNKNOWN), "--inject-profile")
    watched = lane.run([*flags, *ours, str(tmp_path / "p.json")])
    assert watched.evaluations == plain.evaluations
    assert plain.evaluations


@pytest.mark.parametrize("recompute", ["", FULL], ids=["plain", "recompute"])
def test_in_training_each_token_is_counted_once(material, tmp_path, recompute):
    path, recompute = tmp_path / "trained.json", recompute.split()
    run = inject(material, nproc=2, ep=2, extra=("--inject-profile", str(path), *recompute))
    profile = read_profile(path)
    sequences = sum(found.spread.sequences for found in profile.classes.values())
    assert sequences == 4 * 8
    assert (profile.provenance.first_iteration, profile.provenance.last_iteration) == (0, 4)
    assert "written to" in run.output
    plain = inject(material, nproc=2, ep=2, extra=recompute)
    assert run.losses("total loss") == plain.losses("total loss")


def test_a_class_whose_text_training_reads_again_has_no_spread(material, tmp_path):
    """37 samples of each entry: ten steps take 32 of one and 48 of the other."""
    path = tmp_path / "trained.json"
    extra = ("--split", "10,80,10", "--train-iters", "10", "--inject-profile", str(path))
    run = inject(material, extra=extra)
    classes = read_profile(path).classes
    assert classes["general"].spread.sequences == 32
    assert classes["code"].spread is None
    assert "routing profile: code was read more than once, so it has no spread" in run.output


def test_held_out_text_is_counted_once(material, tmp_path):
    path = tmp_path / "p.json"
    extra = ("--inject-profile", str(path), "--skip-train", "--eval-iters")
    run = inject(material, UNKNOWN, extra=(*extra, "4"), check=False)
    assert run.returncode == 2, run.tail()
    assert "would count twice (--inject-profile); set it to 3 or less" in run.output
    nothing = inject(material, UNKNOWN, extra=(*extra, "1", "--split", "1,0,0"), check=False)
    assert nothing.returncode == 2, nothing.tail()
    assert "--inject-profile: there is no validation or test data to measure on" in nothing.output
    assert not path.exists()


def test_capacity_drops_are_counted_apart(material, tmp_path, single):
    extra = ("--moe-expert-capacity-factor", "0.5")
    profile = record(material, tmp_path / "p.json", *extra)
    for name, found in profile.classes.items():
        assert found.dropped.sum() > 0
        assert (found.dropped <= found.selections).all()
        first = single.classes[name].selections[0]  # before any drop, the first layer chooses alike
        assert np.array_equal(found.selections[0], first)


def test_a_sigmoid_router_with_groups_and_bias(material, tmp_path):
    path = tmp_path / "p.json"
    flags = student_flags(
        *material.blend,
        *lane.DEEPSEEK_ROUTER,
        *("--moe-router-topk", "1", "--skip-train", "--eval-iters", "2"),
        *("--inject-recipe", recipe_file(material, UNKNOWN), "--inject-profile", str(path)),
        "--inject-from-scratch",
    )
    lane.run(flags)
    router = read_profile(path).provenance.router
    assert router.score_function == "sigmoid"
    assert (router.num_groups, router.enable_expert_bias) == (2, True)


def test_what_it_records_chooses_the_experts_of_a_run(material, tmp_path):
    path = tmp_path / "a folder" / "of profiles" / "profile.json"
    record(material, path)
    run = inject(material, RECIPE.replace(CHOSEN, BY_PROFILE.format(path)))
    assert "token share until 0.3" in run.output
    assert len(run.iterations) == 4


def test_a_folder_that_cannot_be_made(material, tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "p.json"
    run = inject(material, extra=("--inject-profile", str(path)), check=False)
    assert run.returncode == 2, run.tail()
    assert f"--inject-profile: {path} cannot be written (File exists)" in run.output
    assert "number of parameters on" not in run.output
    assert "Traceback" not in run.output


def test_a_dry_run_of_what_only_records(material, tmp_path):
    profile = ("--inject-profile", str(tmp_path / "p.json"), "--skip-train", "--inject-dry-run")
    run = inject(material, extra=profile, check=False)
    assert run.returncode == 2, run.tail()
    assert "--inject-dry-run: a run that only records" in run.output


def test_the_command_records_the_same(material, single, tmp_path):
    path = tmp_path / "p.json"
    flags = student_flags(*material.blend, "--load", material.student, "--eval-iters", "3", ep=2)
    at = flags.index("--train-iters")
    del flags[at : at + 2]
    ours = ["profile", recipe_file(material, UNKNOWN), "--output", str(path), "--coselections"]
    ours += ["--logits", "3"]
    script = ("-m", "megatron_moe_inject.cli", *ours, "--cpu", "--")
    run = lane.run(flags, nproc=2, script=script)
    assert "routing profile: general" in run.output
    assert_same(read_profile(path), single)
    assert read_profile(path).logits.tokens == {"general": 3, "code": 3}
    assert f"router logits to {path.with_suffix('.safetensors')}" in run.output
    assert "step/s" not in run.output  # the progress bar of a terminal
