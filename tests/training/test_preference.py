"""Preference through ``pretrain()``: the same at every layout, resumed, learned; its mistakes."""

import math
import shutil

import numpy as np
import pytest
import yaml

from tests.harness import covering_array as array
from tests.harness import lane
from tests.harness.array_runs import different
from tests.harness.injection import OTHER, PROVEN, assert_clean_end
from tests.harness.material import make_material, student_flags
from tests.harness.pairs import data_flags, write_pairs

PREFERENCE = ("preference loss", "preference accuracy", "preference margin")
BY_SIDE = tuple(
    f"preference {name}/{side}"
    for name in ("reward", "log prob")
    for side in ("chosen", "rejected")
)
TEXT = ("lm loss", "kd loss", "total loss", "retention loss", "grad norm")
FLAGS = (
    *("--global-batch-size", "8", "--micro-batch-size", "2", "--train-iters", "4"),
    *("--moe-router-load-balancing-type", "none"),
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs")


@pytest.fixture(scope="module")
def run(material, pairs, tmp_path_factory):
    """A run with a preference; ``changes`` are fields of the recipe by dotted path."""
    known = {}

    def call(
        reference="original", *, nproc=1, extra=(), check=True, changes=(), start=None, **layout
    ):
        key = reference, nproc, extra, tuple(layout.items()), str(changes), start
        if key not in known:
            tree = {
                "domains": [
                    {
                        "name": "code",
                        "data": [1],
                        "teacher": "coder",
                        "experts": {"layers": {2: [3], 3: [3]}},
                    }
                ],
                "teachers": {"coder": {"source": f"megatron:{material.teacher}"}},
                "objective": {
                    "alpha": 0.7,
                    "beta": 0.3,
                    "gamma": 1.0,
                    "preference": {"data": [2], "beta": 0.5, "reference": reference},
                },
                "mixing": {"general": 0.25, "preference": 0.5},
            }
            for dotted, value in dict(changes).items():
                array._set(tree, dotted, value)
            path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
            path.write_text(yaml.safe_dump(tree))
            begin = ("--load", material.student, "--finetune", "--no-load-optim", "--no-load-rng")
            flags = student_flags(
                *data_flags(material, pairs),
                *(begin if start is None else start),
                *("--inject-recipe", str(path), "--inject-verify-frozen", *FLAGS, *extra),
                **layout,
            )
            known[key] = lane.run(flags, nproc=nproc, check=check)
        return known[key]

    return call


def assert_same(ours, theirs, names=(*PREFERENCE, *BY_SIDE, *TEXT)):
    """All terms; rewards are differences of log-probabilities, about 20 each."""
    assert len(ours.iterations) == len(theirs.iterations) > 0
    for name in names:
        assert ours.losses(name) == lane.approx(theirs.losses(name), rel=2e-5, abs=2e-6), name


LAYOUTS = {
    "tp2-sp": {},
    "pp2": {},
    "cp2": {},
    "ep2": {},
    "dp2, distributed optimizer": {},
    "micro-batches of one": {},
    "per-token loss": {},
    "pp2-vpp2": {"marks": pytest.mark.slow},
    "full recompute": {"marks": pytest.mark.slow},
    "tp2-pp2": {"marks": pytest.mark.slow},
    "cp2-tp2": {"marks": pytest.mark.slow},
    "tp2-ep2": {"marks": pytest.mark.slow},
    "pp2-vpp2-ep2": {"marks": pytest.mark.slow},
}


@pytest.mark.parametrize("layout", [pytest.param(n, id=n, **more) for n, more in LAYOUTS.items()])
def test_a_layout_gives_what_one_process_gives(run, layout):
    """With the original, which gamma runs anyway, as reference."""
    at = array.LAYOUTS[layout]
    ours = run(nproc=at.nproc, extra=at.flags, **at.sizes)
    assert PROVEN.search(ours.output)
    assert_same(ours, run())


def test_the_first_step_is_at_the_reference(run):
    """Bit for bit: margins are 0, whatever the pairs."""
    one = run()
    assert one.losses("preference margin")[0] == 0
    assert one.losses("preference loss")[0] == pytest.approx(math.log(2), rel=1e-6)
    assert min(map(abs, one.losses("preference margin")[1:])) > 0


@pytest.mark.parametrize(
    "layout",
    [
        "pp2",
        pytest.param("tp2-sp", marks=pytest.mark.slow),
        pytest.param("cp2", marks=pytest.mark.slow),
        pytest.param("dp2, distributed optimizer", marks=pytest.mark.slow),
        pytest.param("micro-batches of one", marks=pytest.mark.slow),
    ],
)
def test_a_teacher_as_reference(run, layout):
    """A teacher of all stages, for each token, with cross-entropy of chosen answers; no gamma."""
    changes = {
        "objective.gamma": 0.0,
        "teachers.coder.ranks": "pipeline" if layout == "pp2" else "last",
        "objective.preference.teacher": "coder",
        "objective.preference.length_normalised": True,
        "objective.preference.label_smoothing": 0.1,
        "objective.preference.sft": 0.2,
        "objective.preference.coeff": {"points": {0: 0.5, 4: 2.0}},
    }
    at = array.LAYOUTS[layout]
    ours = run("teacher", nproc=at.nproc, extra=at.flags, changes=changes, **at.sizes)
    one = run("teacher", changes=changes | {"teachers.coder.ranks": "auto"})
    names = [name for name in (*PREFERENCE, *BY_SIDE, *TEXT) if name != "retention loss"]
    assert_same(ours, one, names)
    assert abs(one.losses("preference margin")[0]) > 0.01


def test_the_original_without_gamma_is_the_same_reference(run):
    """Its pass is then one of its own."""
    changes = {"objective.gamma": 0.0}
    at = array.LAYOUTS["pp2"]
    ours = run(nproc=2, extra=at.flags, changes=changes, **at.sizes)
    assert_same(ours, run(changes=changes), (*PREFERENCE, *BY_SIDE, "grad norm"))
    with_gamma = run()
    assert ours.losses("preference log prob/chosen")[0] == pytest.approx(
        with_gamma.losses("preference log prob/chosen")[0], rel=1e-6
    )


def test_text_is_trained_as_without_a_preference(run):
    """A preference of weight almost 0 changes nothing of the other terms; one of weight 1 does."""
    changes = {"objective.preference.coeff": 1e-12}
    none, one = run(changes=changes), run()
    assert one.losses("kd loss")[0] == none.losses("kd loss")[0]
    assert one.losses("grad norm")[0] != pytest.approx(none.losses("grad norm")[0], rel=1e-3)


@pytest.mark.parametrize("by", [None, "domain"])
def test_beside_adapters(run, by):
    """The original is the student without them; those of a domain do nothing for answers."""
    adapters = [{"targets": ["experts"], "rank": 4}]
    adapters.append({"targets": ["attention"], "rank": 4, **({"by": by} if by else {})})
    changes = {"train": {"experts": "none", "adapters": adapters, "output_layer": True}}
    at = array.LAYOUTS["tp2-sp"]
    one = run(changes=changes)
    assert one.losses("preference margin")[0] == 0
    if by is not None:
        ours = run(nproc=2, extra=(*at.flags, "--expert-tensor-parallel-size", "1"),
                   changes=changes, **at.sizes)  # fmt: skip
        assert_same(ours, one)


def test_a_resumed_run_goes_on_bitwise(run, tmp_path):
    """The order of the pairs, the reference and its weights are those of an uninterrupted run."""
    at = array.LAYOUTS["dp2, distributed optimizer"]
    save = ("--save", str(tmp_path), "--save-interval", "2")
    layout = dict(nproc=2, **at.sizes)
    run(extra=(*at.flags, *save, "--exit-interval", "2"), **layout)
    rest = run(extra=(*at.flags, *save), start=("--load", str(tmp_path)), **layout)
    whole = run(extra=at.flags, **layout)
    clock = "elapsed time per iteration (ms)"
    assert different(rest.iterations, whole.iterations[2:], {clock}) == []
    assert len(rest.iterations) == 2


def test_it_learns(run):
    """Chosen answers go on as the domain does; held to the start by the reference alone."""
    changes = {"objective.alpha": 0.0, "objective.preference.coeff": 5.0}
    extra = ("--train-iters", "40")
    learned = run(extra=extra, changes=changes)
    accuracy = learned.losses("preference accuracy")
    assert sum(accuracy[-10:]) / 10 > 0.95
    margin = learned.losses("preference margin")
    assert np.mean(margin[-10:]) > 4 * np.mean(margin[1:6]) > 0
    assert np.mean(learned.losses("preference loss")[-10:]) < 0.3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"objective.preference.data": [1]}, ("already claimed by",)),
        ({"mixing": {"general": 0.25}}, ("mixing.preference: missing",)),
    ],
    ids=["a domain's data", "no share"],
)
def test_mistakes_of_the_recipe(run, changes, says):
    assert_clean_end(run(check=False, changes=changes), says)


@pytest.mark.parametrize("kind", ["too long", "no pairs", "evaluated on"])
def test_mistakes_of_the_data(run, material, pairs, kind, tmp_path):
    """On every rank, also of those that read none."""
    data = (material.general, material.domain)
    if kind == "too long":
        long = write_pairs(tmp_path / "long", lengths=(14, 30))
        extra, says = ("--train-data-path", *data, long), ("longer than --seq-length 32",)
    elif kind == "no pairs":
        other = str(tmp_path / "text")
        for end in (".bin", ".idx"):
            shutil.copy(material.general + end, other + end)
        extra, says = ("--train-data-path", *data, other), ("holds no pairs", "prepare-pairs")
    else:
        extra = ("--valid-data-path", *data, pairs)
        says = ("objective.preference.data", "is in the valid data, too")
    assert_clean_end(run(check=False, nproc=2, tp=2, extra=extra), says)


@pytest.mark.slow
@pytest.mark.skipif(not OTHER or "0.18" not in OTHER, reason="MEGATRON_OTHER names no 0.18")
def test_the_other_version_gives_the_same_at_pipeline_stages(tmp_path):
    material = make_material(tmp_path, (OTHER,))
    pairs = write_pairs(tmp_path / "pairs")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "domains: [{name: code, data: [1], experts: {layers: {3: [3]}}}]\n"
        "objective: {alpha: 0, beta: 1, preference: {data: [2]}}\nmixing: {preference: 0.5}\n"
    )
    runs = []
    for nproc, layout in ((1, {}), (2, {"pp": 2})):
        flags = student_flags(
            *data_flags(material, pairs),
            *("--load", material.student, "--finetune", "--no-load-optim", "--no-load-rng"),
            *("--inject-recipe", str(recipe), *FLAGS),
            **layout,
        )
        runs.append(lane.run(flags, nproc=nproc, pythonpath=(OTHER,)))
    assert_same(*runs, (*PREFERENCE, *BY_SIDE, "lm loss", "grad norm"))
