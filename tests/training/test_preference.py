"""Preference through ``pretrain()``: the same at every layout, resumed, learned; its mistakes."""

import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_moe_inject import cli
from megatron_moe_inject.data.pairs import packs
from megatron_moe_inject.evaluation.comparison import compare
from megatron_moe_inject.evaluation.evaluation_file import LIST, read_evaluation, read_list
from megatron_moe_inject.host import compat
from tests.harness import covering_array as array
from tests.harness import lane
from tests.harness.array_runs import decided, different
from tests.harness.injection import OTHER, PROVEN, assert_clean_end
from tests.harness.material import make_material, student_flags
from tests.harness.pairs import data_flags, of_held_out, write_pairs
from tests.harness.teacher_server import TeacherServer, thinker

PREFERENCE = ("preference loss", "preference accuracy", "preference margin")
BY_SIDE = tuple(
    f"preference {name}/{side}"
    for name in ("reward", "log prob")
    for side in ("chosen", "rejected")
)
TEXT = ("lm loss", "kd loss", "total loss", "retention loss", "grad norm")
HELD_OUT = ("--eval-iters", "2", "--eval-interval", "2")
FLAGS = (
    *("--global-batch-size", "8", "--micro-batch-size", "2", "--train-iters", "4"),
    *("--moe-router-load-balancing-type", "none"),
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Seven pairs, which fill no batch; in another order than their hashes'."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "held_out", pairs=7, seed=5)


@pytest.fixture(scope="module")
def run(material, pairs, held_out, tmp_path_factory):
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
                if dotted == "teachers":
                    tree["teachers"] |= value
                else:
                    array._set(tree, dotted, value)
            path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
            path.write_text(yaml.safe_dump(tree))
            begin = ("--load", material.student, "--finetune", "--no-load-optim", "--no-load-rng")
            flags = student_flags(
                *data_flags(material, pairs, held_out=held_out),
                *(begin if start is None else start),
                *("--inject-recipe", str(path), "--inject-verify-frozen", *FLAGS, *HELD_OUT),
                *extra,
                **layout,
            )
            known[key] = lane.run(flags, nproc=nproc, check=check)
        return known[key]

    return call


def assert_same(ours, theirs, names=(*PREFERENCE, *BY_SIDE, *TEXT)):
    """All terms; rewards are differences of log-probabilities, about 20 each."""
    measured, expected = of_held_out(ours.output), of_held_out(theirs.output)
    assert len(measured) == len(expected) > 0
    for mine, other in zip(measured, expected, strict=True):
        assert mine == pytest.approx(other, rel=2e-5, abs=2e-5)
    assert len(ours.iterations) == len(theirs.iterations) > 0
    margins = [run.losses("preference margin")[0] for run in (ours, theirs)]
    if 0 in margins and any(margins):  # else they are bit for bit at the reference, or not at it
        ours, theirs = (replace(run, iterations=decided(run.iterations)) for run in (ours, theirs))
    for name in names:
        assert ours.losses(name) == lane.approx(theirs.losses(name), rel=2e-5, abs=2e-6), name


LAYOUTS = {
    "tp2-sp": {},
    "pp2": {},
    "cp2": {"marks": pytest.mark.slow},
    "ep2": {"marks": pytest.mark.slow},
    "dp2, distributed optimizer": {},
    "micro-batches of one": {},
    "per-token loss": {"marks": pytest.mark.slow},
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


@pytest.mark.parametrize("by", [None, pytest.param("domain", marks=pytest.mark.slow)])
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
    extra = ("--train-iters", "40", *lane.ONE_BATCH)
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
        extra = ("--test-data-path", *data, pairs)
        says = ("objective.preference.data", "is in the test data, too")
    assert_clean_end(run(check=False, nproc=2, tp=2, extra=extra), says)


@pytest.fixture(scope="module")
def alone(material, pairs, held_out, tmp_path_factory):
    """Held-out pairs in a run that only evaluates."""

    def call(reference="original", *, nproc=1, extra=(), held=held_out, **layout):
        folder = tmp_path_factory.mktemp("alone")
        recipe, path = folder / "recipe.yaml", folder / "evaluation.json"
        recipe.write_text(
            "domains: [{name: code, data: [1], teacher: coder, experts: {layers: {3: [3]}}}]\n"
            f"teachers: {{coder: {{source: 'megatron:{material.teacher}'}}}}\n"
            f"objective: {{preference: {{data: [2], beta: 0.5, reference: {reference}}}}}\n"
            "mixing: {preference: 0.5}\n"
        )
        flags = student_flags(
            *data_flags(material, pairs, held_out=held),
            *("--load", material.student, "--skip-train"),
            *("--inject-recipe", str(recipe), "--inject-evaluate", str(path), *FLAGS, *HELD_OUT),
            *extra,
            **layout,
        )
        lane.run(flags, nproc=nproc)
        return read_evaluation(path)

    return call


def test_held_out_pairs_beside_training(run, alone, held_out, tmp_path):
    """Before, between and after; the same as alone, side by side, on the page."""
    changes = {"evaluation": {"gate": False}}
    save = ("--save", str(tmp_path), "--save-interval", "2")
    stopped = run(extra=(*save, "--exit-interval", "2"), changes=changes)
    assert len(of_held_out(stopped.output)) == 2
    rest = run(extra=save, changes=changes, start=("--load", str(tmp_path)))
    found = read_list(tmp_path / LIST)
    assert [e.provenance.iteration for e in found] == [0, 2, 4]
    first, _, last = (e.pairs for e in found)
    assert first.data == (held_out,)
    assert first.against == last.against == "original"
    assert first.hashes == last.hashes == tuple(sorted(set(first.hashes)))
    assert len(first.hashes) == 7
    assert not any(first.values()["preference margin"])
    assert last.reference.equal(first.reference)
    assert first.reference.equal(first.log_probs)
    assert last.values()["preference margin"].abs().min() > 0
    assert of_held_out(rest.output)[-1] == pytest.approx(last.means(), rel=1e-5)
    # Alone there is no original model; the student before is the reference then.
    before = alone()
    assert before.pairs.against is None
    torch.testing.assert_close(before.pairs.log_probs, first.log_probs, rtol=1e-6, atol=1e-6)
    told = compare(found[0], found[-1], ("first", "last"))
    for row in ("loss", "accuracy", "margin", "reward/chosen", "log prob/rejected"):
        assert re.search(rf"\| {row} +\|", told), row
    assert "7; loss and rewards against original, beta 0.5" in told
    pytest.importorskip("jinja2")
    assert cli.main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "inject_report.html").read_text()
    assert "held-out pairs: margin" in page


@pytest.mark.parametrize("layout", [
    "dp2, distributed optimizer",
    pytest.param("tp2-sp", marks=pytest.mark.slow),
    pytest.param("cp2", marks=pytest.mark.slow),
    pytest.param("pp2-vpp2", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_teacher_measures_held_out_pairs_alone(alone, layout):
    at = array.LAYOUTS[layout]
    flags = [flag for flag in at.flags if "overlap" not in flag and "optimizer" not in flag]
    one, ours = (
        found.pairs
        for found in (alone("teacher"), alone("teacher", nproc=at.nproc, extra=flags, **at.sizes))
    )
    assert ours.hashes == one.hashes
    assert ours.against == "coder"
    for mine, other in zip(ours.sums().values(), one.sums().values(), strict=True):
        assert mine == pytest.approx(other, rel=2e-5)


def test_servers_as_reference(run, llama):
    """Over HTTP what the same model beside the student says, in training and of held-out pairs."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(str(llama)).eval()
    changes = {"objective.gamma": 0.0, "objective.preference.teacher": "judge"}
    live = run("teacher", changes=changes | {"teachers": {"judge": {"source": f"hf:{llama}"}}})
    with TeacherServer(thinker(model)) as server:
        patience = {"top": 69, "timeout": 20, "patience": 20}
        judge = {"source": f"server:{server.url}", "server": patience}
        ours = run("teacher", changes=changes | {"teachers": {"judge": judge}})
        long = [text for text in server.asked if len(text) > 16]  # the longest answer
    assert_same(ours, live, (*PREFERENCE, *BY_SIDE, "grad norm"))
    assert len(long) <= 2 < len(server.asked)  # a probe and its long form; no filled-up sample


PACKED = ("--dataloader-inter-document-masking", "--micro-batch-size", "1")
not_before_19 = pytest.mark.skipif(
    compat.megatron_version().startswith("0.18"), reason="0.18 does not pack in the loader"
)


@not_before_19
def test_packed_pairs_give_what_they_give_one_by_one(run, alone, material, tmp_path):
    """Each step has all pairs, in packs of several or an answer to a sample. Held out, the same."""
    own = write_pairs(tmp_path / "pairs", pairs=6, seed=9, lengths=(3, 6))
    files = IndexedDataset(own)
    sizes = np.array(files.sequence_lengths).reshape(-1, 3)
    count = len(packs((sizes.sum(1) + sizes[:, 0]).tolist(), 32))
    assert count < 6
    changes = {
        "objective.alpha": 0.0, "objective.beta": 1e-12, "objective.gamma": 0.0,
        "mixing": {"preference": 0.5},
    }  # fmt: skip
    data = ("--train-data-path", material.general, material.domain, own)
    runs = [
        run(changes=changes, extra=(*data, "--global-batch-size", str(size), *more))
        for size, more in ((2 * count, PACKED), (24, ()))
    ]
    for name in (*PREFERENCE, *BY_SIDE, "grad norm"):
        one, other = (found.losses(name) for found in runs)
        assert one == lane.approx(other, rel=2e-5, abs=2e-6), name
    packed, single = (alone(held=own, extra=extra).pairs for extra in (PACKED, ()))
    assert packed.hashes == single.hashes
    torch.testing.assert_close(packed.log_probs, single.log_probs, rtol=2e-5, atol=2e-5)
    means, first = single.means(), runs[0].iterations[0]
    for side in ("chosen", "rejected"):  # which the passes before a step measured
        name = f"preference log prob/{side}"
        assert means[name] == pytest.approx(first[name], rel=2e-5)


@pytest.mark.slow
@not_before_19
@pytest.mark.parametrize(
    "layout", ["tp2-sp", "pp2", "dp2, distributed optimizer", "several packs in a row"]
)
def test_a_layout_gives_the_same_packed(run, layout):
    if layout == "several packs in a row":
        ours = run(extra=(*PACKED, "--micro-batch-size", "2"))
    else:
        at = array.LAYOUTS[layout]
        ours = run(nproc=at.nproc, extra=(*at.flags, *PACKED), **at.sizes)
    assert_same(ours, run(extra=PACKED))


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
            *data_flags(material, pairs, held_out=pairs),
            *HELD_OUT,
            *("--load", material.student, "--finetune", "--no-load-optim", "--no-load-rng"),
            *("--inject-recipe", str(recipe), *FLAGS),
            **layout,
        )
        runs.append(lane.run(flags, nproc=nproc, pythonpath=(OTHER,)))
    assert_same(*runs, (*PREFERENCE, *BY_SIDE, "lm loss", "grad norm"))
