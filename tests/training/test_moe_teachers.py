"""Teachers that are mixtures of experts, whole on each rank or with their experts on several."""

import re

import pytest

from tests.harness import lane
from tests.harness.dense_student import RECIPE, measure, teach
from tests.harness.evaluating import assert_same
from tests.harness.injection import (
    CE_ONLY,
    OTHER,
    assert_clean_end,
    inject,
    recipe_file,
)
from tests.harness.injection import RECIPE as SELECTED
from tests.harness.material import make_material
from tests.harness.moe_teacher import KINDS, flags_of, with_teacher

TERMS = ("lm loss", "kd loss", "total loss", "grad norm")
ON_TWO = ("--inject-set", "teachers.coder.ep=2")
# Ranks have up to four passes of four samples, and not as many as each other.
UNEVEN = ("--global-batch-size", "32", "--data-path", "0.7", "{general}", "0.3", "{domain}")
NOWHERE = CE_ONLY.replace("data: [1]}}", "data: [1], teacher: coder}}").replace(
    "objective:", 'teachers:\n  coder: {{source: "megatron:{teacher}"}}\nobjective:'
)


def uneven(material):
    return [flag.format(general=material.general, domain=material.domain) for flag in UNEVEN]


def assert_same_losses(run, other, rel=2e-5):
    for term in TERMS:
        assert run.losses(term) == lane.approx(other.losses(term), rel=rel), term


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] if k == "softmax" else []) for k in KINDS]
)
def test_a_model_taught_by_itself_has_nothing_to_learn(material, kind):
    """The student is the checkpoint that teaches it: the divergence of the first step is 0."""
    taught = with_teacher(material, kind)
    start = ("--load", taught.teacher, "--finetune", "--no-load-optim", "--no-load-rng")
    ours = ("--inject-recipe", recipe_file(taught, RECIPE), "--train-iters", "2")
    run = lane.run(flags_of(kind, *material.blend, *start, *ours))
    first, second = run.losses("kd loss")
    assert abs(first) < 1e-8
    assert second > 1e-5


@pytest.fixture(scope="module")
def one_process(material):
    taught = with_teacher(material, "deepseek")
    return taught, teach(taught, RECIPE, *uneven(material))


SPREAD, LAST = "teachers.coder.ranks=pipeline", "teachers.coder.ranks=last"
WINDOW = "teachers.coder.window=2"


@pytest.mark.parametrize(
    ("nproc", "ep", "layout", "sets"),
    [
        (2, 2, {}, ()),
        pytest.param(2, 1, {}, (), marks=pytest.mark.slow),
        pytest.param(2, 2, {"tp": 2}, (), marks=pytest.mark.slow),
        pytest.param(2, 2, {"cp": 2}, (), marks=pytest.mark.slow),
        pytest.param(4, 4, {}, (), marks=pytest.mark.slow),
        pytest.param(4, 2, {"pp": 2}, (LAST,), marks=pytest.mark.slow),
        (4, 2, {"pp": 2}, (SPREAD, WINDOW)),
        pytest.param(4, 2, {"pp": 2}, (SPREAD,), marks=pytest.mark.slow),
        pytest.param(4, 2, {"pp": 2}, (LAST, WINDOW), marks=pytest.mark.slow),
        pytest.param(4, 2, {"pp": 2, "tp": 2}, (SPREAD,), marks=pytest.mark.slow),
        pytest.param(4, 4, {"tp": 2}, (), marks=pytest.mark.slow),
        pytest.param(2, 2, {}, (WINDOW,), marks=pytest.mark.slow),
    ],
)
def test_experts_on_several_ranks_teach_the_same(material, one_process, nproc, ep, layout, sets):
    taught, one = one_process
    more = (*uneven(material), "--inject-set", f"teachers.coder.ep={ep}", *sets)
    run = teach(taught, RECIPE, *more, nproc=nproc, **layout)
    assert_same_losses(run, one)


def test_in_fp8_each_expert_gets_rows_that_it_can_multiply(material, one_process):
    """Around a stand-in that rounds nothing and refuses other rows, as Transformer Engine does."""
    taught, one = one_process
    sets = ("--inject-set", "teachers.coder.ep=2", "teachers.coder.fp8=tensorwise")
    entry = (str(lane.HARNESS / "fp8_teacher_gpt.py"),)
    run = teach(taught, RECIPE, *uneven(material), *sets, nproc=2, script=entry)
    assert_same_losses(run, one)
    numbers = [int(n) for n in re.findall(r"products: (\d+)", run.output)]
    # Of three layers attention's two products and those of a dense MLP, of shared experts, and of
    # two experts on each rank, in each of the passes of four steps.
    assert len(numbers) == 2
    assert all(number % (3 * 2 + 2 + 2 * (2 + 2 * 2)) == 0 for number in numbers)
    assert min(numbers) > 0


def test_the_plan_tells_what_a_rank_holds(one_process, material):
    taught, whole = one_process
    half = teach(taught, RECIPE, *ON_TWO, "--inject-dry-run", nproc=2)

    def memory(run):
        row = next(line for line in run.output.splitlines() if "1 of 4 experts" in line)
        return float(row.split("KiB")[0].split()[-1])

    experts = 2 * 4 * 3 * 48 * 40 * 4 / 1024
    assert memory(whole) - memory(half) == pytest.approx(experts / 2, abs=0.2)


def test_the_students_own_experts_and_their_balance_stay_as_they_are(material):
    """A teacher that listens nowhere changes no loss, no norm and no number of the router's log."""
    taught = with_teacher(material, "softmax")
    alone = inject(taught, CE_ONLY, nproc=2, ep=2)
    beside = inject(taught, NOWHERE, nproc=2, ep=2, extra=ON_TWO)
    for term in ("lm loss", "grad norm", "load_balancing_loss"):
        assert beside.losses(term) == alone.losses(term), term


@pytest.mark.slow
def test_chosen_experts_learn_from_experts(material):
    taught = with_teacher(material, "hybrid")
    one = inject(taught, SELECTED)
    two = inject(taught, SELECTED, nproc=2, ep=2, extra=ON_TWO)
    assert_same_losses(two, one)


@pytest.mark.slow
def test_all_stages_run_a_teacher_whose_experts_are_whole_on_each(material, one_process):
    taught, one = one_process
    spread = ("--inject-set", "teachers.coder.ranks=pipeline")
    run = teach(taught, RECIPE, *uneven(material), *spread, nproc=2, pp=2)
    assert_same_losses(run, one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sets", "layout"),
    [((), {"nproc": 2}), ((SPREAD,), {"nproc": 4, "pp": 2})],
    ids=["dp2", "dp2-pp2 on all stages"],
)
def test_a_resumed_run_goes_on_bitwise(material, one_process, tmp_path, sets, layout):
    """Also where times that are measured in the first steps would divide other teachers' work."""
    taught, _ = one_process
    own = (*uneven(material), *ON_TWO, *sets)
    more = (*own, "--save", str(tmp_path), "--save-interval", "2")
    whole = teach(taught, RECIPE, *own, **layout)
    teach(taught, RECIPE, *more, "--exit-interval", "2", **layout)
    run = teach(taught, RECIPE, *more, start=("--load", str(tmp_path)), **layout)
    for term in TERMS:
        assert run.losses(term) == whole.losses(term)[2:], term


def test_it_is_measured_beside_a_dense_student(material, one_process, tmp_path):
    """Losses, divergence and the gate's numbers, with its experts on one rank and on two."""
    taught, _ = one_process
    one = measure(taught, tmp_path / "one.json")
    assert one.classes["code"].sums["teacher_loss"].sum() > 0
    assert_same(measure(taught, tmp_path / "two.json", *ON_TWO, nproc=2), one)


@pytest.mark.skipif(OTHER is None, reason="needs MEGATRON_OTHER")
@pytest.mark.slow
def test_another_megatron(tmp_path):
    material = make_material(tmp_path, (OTHER,))
    for kind in KINDS:
        taught = with_teacher(material, kind, (OTHER,))
        one = teach(taught, RECIPE, pythonpath=(OTHER,))
        two = teach(taught, RECIPE, *ON_TWO, nproc=2, pythonpath=(OTHER,))
        assert_same_losses(two, one)


@pytest.mark.parametrize(
    ("kind", "instead", "fragments"),
    [
        ("deepseek", "ep=3", ["teachers.coder.ep: 3 does not divide the 4 experts"]),
        ("deepseek", "ep=4", ["teachers.coder.ep: 4 does not divide the 2 ranks"]),
        ("deepseek", "ep=0", ["teachers.coder.ep: 0 is no number of ranks"]),
        (None, "ep=2", ["teachers.coder.ep: 2 has nothing to divide", "is dense"]),
        ("deepseek", "{source: 'hf:/x', ep: 2}", ["is not for a teacher of hf"]),
        ("deepseek", "{fp8: tensorwise, ep: 2}", ["teachers.coder.fp8: 'tensorwise'", "a GPU"]),
    ],
)
def test_mistakes_end_in_one_message(material, kind, instead, fragments):
    taught = material if kind is None else with_teacher(material, kind)
    key = "teachers.coder"
    if instead.startswith("{"):
        names = instead.strip("{}").split(", ")
        changes = [f"{key}.{name.replace(': ', '=')}" for name in names]
    else:
        changes = [f"{key}.{instead}"]
    told = teach(taught, RECIPE, "--inject-set", *changes, nproc=2, check=False)
    assert_clean_end(told, fragments)
