"""``train.everything``: the whole student trains, dense or with experts, as in stock Megatron."""

import pytest

from tests.harness import covering_array as array
from tests.harness import lane
from tests.harness.array_runs import CLOCK, different
from tests.harness.dense_student import RECIPE, dense_flags, teach
from tests.harness.injection import OTHER, assert_clean_end, recipe_file
from tests.harness.material import make_material, student_flags

TERMS = ("lm loss", "kd loss", "total loss", "lm loss/code", "lm loss/general", "grad norm")
CE_ALONE = """
domains:
  - {{name: code, data: [1]}}
objective: {{alpha: 0.0, beta: 1.0}}
train: {{everything: true}}
"""
ALL_TERMS = """
domains:
  - {{name: code, data: [1], teacher: coder}}
teachers:
  coder: {{source: "megatron:{teacher}", layers: {{1: 0, 3: 1}}}}
objective:
  alpha: 0.7
  beta: {{points: {{0: 0.6, 4: 0.2}}}}
  gamma: 2.0
  confidence: label
imitation: {{hidden: 0.5}}
retention: {{l2: 0.05}}
train: {{everything: true}}
"""
LOGGED = (*TERMS, "retention loss", "imitation loss", "l2 to start")
STUDENTS = {"dense": dense_flags, "experts": student_flags}
LAYOUTS = {
    name: at
    for name, at in array.LAYOUTS.items()
    if "ep" not in at.sizes and name != "micro-batches of one"
}
"""Those of the covering array that a student without experts has."""
SELDOM = ("pp2", "cp2", "full recompute", "selective recompute", "per-token loss")
BF16_SHARDED = (*lane.DISTRIBUTED_OPTIMIZER, "--bf16")
VIRTUAL = ("--num-layers-per-virtual-pipeline-stage", "1")


@pytest.fixture(scope="module")
def one_process(material):
    """All terms on one process."""
    return teach(material, ALL_TERMS)


@pytest.mark.parametrize(
    ("student", "layout", "nproc", "more"),
    [
        ("dense", {}, 1, ()),
        pytest.param("dense", {"tp": 2}, 2, (), marks=pytest.mark.slow),
        pytest.param("dense", {}, 2, BF16_SHARDED, marks=pytest.mark.slow),
        ("experts", {"ep": 2}, 2, ("--mtp-num-layers", "1")),
        pytest.param("experts", {"pp": 2}, 2, VIRTUAL, marks=pytest.mark.slow),
    ],
    ids=["dense", "dense, tp2-sp", "dense, dp2 in bf16", "experts, ep2, mtp", "experts, pp2-vpp2"],
)
def test_cross_entropy_alone_is_stock_training(material, student, layout, nproc, more):
    """Losses and gradient norms to the last digits, with every parameter of Megatron's."""
    data = (*material.blend, "--vocab-size", "64", "--train-iters", "4")
    flags = STUDENTS[student](*data, *more, **layout)
    stock = lane.run(flags, nproc=nproc)
    ours = ("--inject-from-scratch", "--inject-recipe", recipe_file(material, CE_ALONE))
    run = lane.run([*flags, *ours], nproc=nproc)
    rel = 2e-3 if "--bf16" in more else 2e-6
    assert run.losses("lm loss") == pytest.approx(stock.losses("lm loss"), rel=rel)
    assert run.losses("grad norm") == pytest.approx(stock.losses("grad norm"), rel=rel)
    assert "everything, as without the plugin" in run.output


def test_all_terms_show(one_process):
    for term in LOGGED:
        assert one_process.losses(term)[-1] > 0, term


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if at.slow or name in SELDOM else [])
        for name, at in LAYOUTS.items()
    ],
)
def test_a_dense_student_at_every_layout(material, one_process, name):
    at = LAYOUTS[name]
    run = teach(material, ALL_TERMS, *at.flags, nproc=at.nproc, **at.sizes)
    for term in LOGGED:
        expected = lane.approx(one_process.losses(term), rel=2e-5, abs=1e-6)
        assert run.losses(term) == expected, term


@pytest.mark.parametrize(
    ("layout", "more"),
    [({}, BF16_SHARDED), pytest.param({"pp": 2}, (), marks=pytest.mark.slow)],
    ids=["dp2, distributed optimizer, bf16", "pp2"],
)
def test_a_resumed_run_goes_on_bitwise(material, tmp_path, layout, more):
    layout = {"nproc": 2, **layout}
    whole = teach(material, ALL_TERMS, *more, **layout)
    keep = ("--save", str(tmp_path), "--save-interval", "2")
    teach(material, ALL_TERMS, *more, *keep, "--exit-interval", "2", **layout)
    run = teach(material, ALL_TERMS, *more, *keep, start=("--load", str(tmp_path)), **layout)
    assert different(run.iterations, whole.iterations[2:], {CLOCK}) == []


def test_a_stock_run_goes_on_with_its_optimizer_and_so_does_stock_after_it(material, tmp_path):
    """The checkpoints of both are of one kind, in whose curve nothing shows where the recipe began
    and ended."""
    data = (*material.blend, "--vocab-size", "64", "--train-iters", "6")
    keep = ("--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "2")
    flags = dense_flags(*data, **{"pp": 2})
    stock = lane.run(flags, nproc=2)
    lane.run([*flags, *keep, "--exit-interval", "2"], nproc=2)
    ours = ("--inject-recipe", recipe_file(material, CE_ALONE))
    run = lane.run([*flags, *keep, *ours, "--exit-interval", "4"], nproc=2)
    after = lane.run([*flags, *keep], nproc=2)
    losses = run.losses("lm loss") + after.losses("lm loss")
    assert losses == pytest.approx(stock.losses("lm loss")[2:], rel=2e-6)
    norms = run.losses("grad norm") + after.losses("grad norm")
    assert norms == pytest.approx(stock.losses("grad norm")[2:], rel=2e-5)


def test_plain_flags(material):
    """One teacher, all the text: no recipe is needed."""
    flags = dense_flags("--data-path", material.domain, "--split", "90,5,5", "--train-iters", "2")
    plain = ("--inject-teacher", f"megatron:{material.teacher}", "--inject-domain-data", "0")
    run = lane.run([*flags, *plain, "--inject-train-everything", "--inject-from-scratch"])
    assert run.losses("kd loss")[-1] > 0


def test_the_share_of_cross_entropy_falls(material):
    falls = CE_ALONE.replace("data: [1]}}", "data: [0], teacher: coder}}").replace(
        "objective: {{alpha: 0.0, beta: 1.0}}",
        'teachers: {{coder: {{source: "megatron:{teacher}"}}}}\n'
        "objective: {{ce_share: {{points: {{0: 0.9, 4: 0.1}}}}, temperature: 2.0}}",
    )
    run = teach(material, falls, "--data-path", material.domain)
    whole, text, divergence = map(run.losses, ("total loss", "lm loss", "kd loss"))
    for step, share in enumerate((0.9, 0.7, 0.5, 0.3)):
        expected = share * text[step] + (1 - share) * divergence[step]
        assert whole[step] == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(OTHER is None, reason="needs MEGATRON_OTHER")
@pytest.mark.slow
def test_another_megatron(tmp_path):
    material = make_material(tmp_path, (OTHER,))
    run = teach(material, ALL_TERMS, pythonpath=(OTHER,))
    two = teach(material, ALL_TERMS, nproc=2, pp=2, pythonpath=(OTHER,))
    for term in LOGGED:
        assert two.losses(term) == pytest.approx(run.losses(term), rel=2e-5), term


@pytest.mark.parametrize(
    ("instead", "fragments"),
    [
        ("steering.report=true", ["steering.report", "no domain chose experts"]),
        ("domains[0].experts=1:2", ["experts.layers.1", "of a dense student"]),
        ("retention.experts=1", ["retention.experts: 1.0 holds experts", "student is dense"]),
        ("imitation.experts=1", ["domains[0].experts.layers", "no experts to imitate"]),
        ("train.router=true", ["train.router: True stands beside train.everything"]),
        ("train.experts=all", ["train.experts: 'all' stands beside train.everything"]),
        ("train.adapters=[{targets: [attention]}]", ["train.adapters", "beside train.everything"]),
        ("verify_frozen=true", ["verify_frozen: True has nothing to prove"]),
    ],
)
def test_what_makes_no_sense_is_refused(material, instead, fragments):
    told = teach(material, RECIPE, "--inject-set", instead, check=False)
    assert_clean_end(told, fragments)
