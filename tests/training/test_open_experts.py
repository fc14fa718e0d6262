"""New experts of two domains behind a door: shut at first, then found by their domain alone."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch

from megatron_moe_inject.cli import main
from megatron_moe_inject.experts.choose.profile_file import read_profile
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.new_experts import STORED as CARD
from megatron_moe_inject.host.open_door import STORED
from megatron_moe_inject.host.torch_dist_copy import saved_copy
from tests.harness import lane
from tests.harness.checkpoints import SAVE, whole
from tests.harness.corpus import write_apart
from tests.harness.injection import LAYOUTS, OTHER, PROVEN, assert_clean_end, inject, recipe_file
from tests.harness.material import student_flags

STILL = ("--moe-router-load-balancing-type", "none")
KINDS = {"softmax": STILL, "sigmoid": (*lane.DEEPSEEK_ROUTER, *STILL)}
"""The second has groups and an expert bias, which closes new experts."""
EXPERTS = {"softmax": 6, "sigmoid": 8}
DONORS = {"softmax": "0,2", "sigmoid": "0,1,2,3"}
BIAS = "decoder.layers.mlp.router.expert_bias"
SHUT, STEPS = 3, 24
"""Steps at whose beginning the door is shut; all steps."""
MOST_GENERAL = 0.1
"""The bound on the share of general choices on the new experts of a domain."""
RECIPE = """
domains:
  - {{name: code, data: [1], teacher: coder, experts: {{new: code}}}}
  - {{name: html, data: [2], teacher: writer, experts: {{new: html}}}}
teachers:
  coder: {{source: "megatron:{teacher}"}}
  writer: {{source: "megatron:WRITER"}}
objective: {{alpha: 0.7, beta: 0.3, gamma: 0.5}}
train: {{router_rows: true}}
steering: {{coeff: 1.0, target_mass: 0.6, retention: 2.0}}
routing: {{open: {{points: {{2: 0.0, 8: 1.0}}}}}}
"""
WITHOUT_TEACHERS = """
domains:
  - {{name: code, data: [1], experts: {{new: code}}}}
  - {{name: html, data: [2], experts: {{new: html}}}}
objective: {{alpha: 0.0, beta: 1.0}}
train: {{router_rows: true}}
steering: {{coeff: 1.0, target_mass: 0.6}}
routing: {{open: {{points: {{2: 0.0, 8: 1.0}}}}}}
"""


def opened(folder):
    return CheckpointPlace("CKPT", Path(folder)).open()


@pytest.fixture(scope="module")
def apart(material, tmp_path_factory):
    """Flags of a blend of general text and two domains, each of ids of its own; and the recipe,
    whose second teacher has trained on the second domain."""
    folder = tmp_path_factory.mktemp("apart")
    prefixes = write_apart(folder, ("text", "code", "html"))
    dense = [f for f in lane.dense() if f != "--mock-data"]
    data = ("--data-path", prefixes[2], "--split", "90,5,5", "--train-iters", "20", *lane.ONE_BATCH)
    sizes = ("--hidden-size", "48", "--ffn-hidden-size", "64", "--vocab-size", "61")
    save = (*SAVE, str(folder / "writer"), "--make-vocab-size-divisible-by", "8")
    lane.run([*dense, *sizes, *data, *save, "--lr", "1e-2"])
    blend = [part for pair in zip(("0.4", "0.3", "0.3"), prefixes, strict=True) for part in pair]
    data = ("--data-path", *blend, "--split", "90,5,5")
    return material, data, RECIPE.replace("WRITER", str(folder / "writer"))


@pytest.fixture(scope="module")
def grown(apart, tmp_path_factory):
    """A student of each kind of router, and it with new experts for both domains."""

    @functools.cache
    def make(kind, *path):
        folder = tmp_path_factory.mktemp("grown")
        data = (*apart[1], "--train-iters", "6", *SAVE, str(folder / "student"))
        lane.run(student_flags(*data, *KINDS[kind]), pythonpath=path)
        options = ["--per-layer", str(EXPERTS[kind] - 4), "--donors", DONORS[kind]]
        options += ["--domain", "code", "--domain", "html", "--unmeasured"]
        base, output = str(folder / "student"), str(folder / "grown")
        assert main(["add-experts", base, "--output", output, *options]) == 0
        return folder / "student", folder / "grown"

    return make


@pytest.fixture(scope="module")
def opening(apart, grown):
    """Trains a grown student at a layout of the covering array, or on one process."""
    material, data, own_recipe = apart

    def run(kind, *flags, recipe=own_recipe, layout=None, steps=STEPS, path=(), **more):
        at = dict(LAYOUTS[layout]) if layout else {}
        start = ("--load", str(grown(kind, *path)[1]), "--num-experts", str(EXPERTS[kind]))
        extra = (*data, *KINDS[kind], *start, *at.pop("extra", ()), "--train-iters", str(steps))
        return inject(material, recipe, extra=(*extra, *flags), path=path, **at, **more)

    return run


@pytest.fixture(scope="module")
def ran(opening, tmp_path_factory):
    """Whole runs, by kind of router and layout, each saved."""

    @functools.cache
    def run(kind, layout):
        folder = tmp_path_factory.mktemp("run")
        return opening(kind, *SAVE, str(folder), layout=layout), folder

    return run


@pytest.mark.parametrize(
    ("kind", "layout"), [("softmax", None), pytest.param("sigmoid", "ep2", marks=pytest.mark.slow)]
)
def test_each_domain_finds_its_own_and_general_tokens_stay_away(ran, kind, layout):
    run, _ = ran(kind, layout)
    assert PROVEN.search(run.output)
    assert "open to linear(2: 0, 8: 1) of their unnormalised probability" in run.output
    assert "for html: " in run.output
    steps = [min(max(n - 2, 0) / 6, 1) for n in range(STEPS)]
    assert run.losses("new experts open") == pytest.approx(steps)
    for domain in ("code", "html"):
        shares = run.losses(f"target share/{domain}")
        assert shares[:SHUT] == [0] * SHUT
        assert shares[-1] > 0.3
        assert shares[-1] <= run.losses(f"new share/{domain}")[-1]
        assert run.losses(f"general on targets/{domain}")[-1] < MOST_GENERAL
    assert run.losses("new share/general")[-1] < 2 * MOST_GENERAL
    # The original router gives new experts nothing, though their rows' mean gives them a third.
    assert run.losses("router retention")[0] > 0.3
    # What is shut is not there: the original model, which has no door, is the same.
    assert run.losses("retention loss")[:SHUT] == [0] * SHUT
    assert run.losses("kd loss/code")[-1] < run.losses("kd loss/code")[0]


def test_shut_the_model_is_its_base(apart, grown, opening):
    material, data, recipe = apart
    for kind in KINDS:
        shut = opening(kind, steps=1)
        plain = recipe[: recipe.index("routing:")].replace("steering:", "#").replace("gamma", "#")
        plain = plain.replace(", #: 0.5", "")
        for domain in ("code", "html"):
            plain = plain.replace(f"{{{{new: {domain}}}}}", "{{layers: {{1: [0]}}}}")
        load = ("--load", str(grown(kind)[0]), "--train-iters", "1")
        base = inject(material, plain, extra=(*data, *KINDS[kind], *load))
        for name in ("lm loss", "kd loss/html"):
            assert shut.losses(name) == pytest.approx(base.losses(name), rel=1e-6), (kind, name)


@pytest.mark.parametrize(
    "layout",
    [
        "pp2",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("tp2-sp", "cp2", "full recompute", "selective recompute", "tp2-ep2")
        ),
    ],
)
def test_layouts_open_alike(ran, layout):
    ours, other = (ran("sigmoid", name)[0] for name in ("ep2", layout))
    for name in ("lm loss", "kd loss/html", "new share/code", "new share/general", "grad norm"):
        # A token between two experts may go either way.
        assert ours.losses(name)[:8] == pytest.approx(other.losses(name)[:8], rel=1e-3), name


def test_an_expert_that_was_closed_has_its_donors_bias_when_it_is_open(ran, grown):
    _, folder = ran("sigmoid", "ep2")
    old, new = whole(opened(grown("sigmoid")[1]), BIAS), whole(opened(folder), BIAS)
    card = getattr(opened(folder).args, CARD)
    assert getattr(opened(folder).args, STORED)["open"] == 1
    moved, added = card["moved"], sorted(set(range(8)) - set(card["moved"]))
    assert torch.equal(old[:, moved], new[:, moved])
    assert (old[:, added] < old[:, moved].min() - 1).all()
    donors = [moved[int(donor)] for donor in DONORS["sigmoid"].split(",")]
    assert torch.equal(new[:, added], old[:, donors])


@pytest.fixture(scope="module")
def half(opening, tmp_path_factory):
    """Stopped after five steps, when the door is half open."""
    folder = tmp_path_factory.mktemp("half")
    opening("softmax", *SAVE, str(folder), "--exit-interval", "5")
    assert getattr(opened(folder).args, STORED)["open"] == pytest.approx(0.5)
    return folder


def test_resumed_it_goes_on_bit_for_bit(material, apart, ran, half, tmp_path):
    whole_run, _ = ran("softmax", None)
    flags = ("--load", str(half), "--num-experts", "6", "--train-iters", str(STEPS), *SAVE)
    extra = [*apart[1], *STILL, *flags, str(tmp_path / "on")]
    resumed = _going_on(material, apart[2], extra)
    assert [x["iteration"] for x in resumed.iterations] == list(range(6, STEPS + 1))
    for name in ("lm loss", "new share/html", "new experts open", "grad norm"):
        assert resumed.losses(name) == whole_run.losses(name)[5:], name


def _without_door(common):
    args = copy.copy(common["args"])
    delattr(args, STORED)
    return {**common, "args": args}


def _going_on(material, recipe, extra, *, check=True):
    ours = ("--inject-recipe", recipe_file(material, recipe), "--inject-verify-frozen")
    return lane.run(student_flags(*ours, *extra), check=check)


def test_saved_half_open_it_is_measured_so_and_exported_nowhere(
    material, apart, half, grown, tmp_path, capsys
):
    place, base = str(half), str(grown("softmax")[1])
    delta = ["export-delta", "--base", base, "--trained", place, "--output", str(tmp_path / "d")]
    assert main(delta) == 2
    assert "was saved while routing.open was at 0.5" in capsys.readouterr().err
    extra = [*apart[1], *STILL, "--load", place, "--num-experts", "6"]
    plain = apart[2][: apart[2].index("routing:")]
    run = _going_on(material, plain, [*extra, "--train-iters", "9"], check=False)
    assert_clean_end(run, ["routing.open: ", "was saved while it was at 0.5", "write the points"])

    def share(*flags):
        file = tmp_path / "profile.json"
        own = ("--skip-train", "--eval-iters", "2", "--inject-profile", str(file))
        run = _going_on(material, plain, [*extra, *own, *flags])
        assert ("routing.open was at 0.5, and was measured so" in run.output) is (not flags)
        new = {layer: [4, 5] for layer in range(4)}
        return read_profile(file).classes["code"].share_of(new, range(4))

    as_saved = share()
    # The same weights, whoever forgets the door.
    folder = tmp_path / "forgotten"
    folder.mkdir()
    saved_copy(opened(half), folder, {}, lambda items, n: items, common=_without_door)
    assert as_saved < share("--load", str(folder)) / 2


def test_the_update_of_the_bias_waits_until_the_door_is_open(opening, grown, apart, tmp_path):
    recipe = apart[2].replace("router_rows", "router").replace("8: 1.0", "100: 1.0")
    flags = ("--moe-router-bias-update-rate", "0.05", *SAVE, str(tmp_path / "run"))
    run = opening("sigmoid", *flags, recipe=recipe, steps=3)
    assert "routing.open is at 0.0102 when training ends" in run.output
    old, new = whole(opened(grown("sigmoid")[1]), BIAS), whole(opened(tmp_path / "run"), BIAS)
    card = getattr(opened(tmp_path / "run").args, CARD)
    moved, added = card["moved"], sorted(set(range(8)) - set(card["moved"]))
    assert not torch.equal(old[:, moved], new[:, moved])
    donors = [moved[int(donor)] for donor in DONORS["sigmoid"].split(",")]
    assert torch.equal(new[:, added], old[:, donors])


@pytest.mark.slow
@pytest.mark.skipif(OTHER is None, reason="MEGATRON_OTHER is not set")
def test_the_other_megatron_opens_it_too(opening):
    """Its own checkpoint: it does not read the newer one's."""
    run = opening("sigmoid", path=(OTHER,), recipe=WITHOUT_TEACHERS, steps=12)
    assert run.losses("target share/code")[:SHUT] == [0] * SHUT
    assert run.losses("target share/code")[-1] > 0.2


def test_a_door_without_new_experts_ends_at_start(material, apart):
    _, data, recipe = apart
    old = recipe.replace("{{new: code}}", '"1:0"').replace("{{new: html}}", '"1:1"')
    run = inject(material, old, extra=(*data, *STILL), check=False)
    assert_clean_end(run, ["routing.open: opens new experts, but the student's checkpoint has"])
