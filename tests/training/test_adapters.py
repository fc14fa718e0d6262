"""Adapters through the real ``pretrain()``: at every layout the run of one process, from the
original model on, resumed bitwise, with nothing else moved."""

import re

import pytest

from megatron_moe_inject.adapters.merge import merge_adapters
from megatron_moe_inject.evaluation.evaluation_file import read_list
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from tests.harness import lane
from tests.harness.evaluating import EVALUATIONS, evaluate
from tests.harness.grouped import grouped
from tests.harness.injection import (
    LAYOUTS,
    OTHER,
    PROVEN,
    TERMS,
    assert_clean_end,
    inject,
    recipe_file,
)
from tests.harness.material import make_material, student_flags

RECIPE = """
domains:
  - name: code
    data: [1]
    teacher: coder
    experts: {{layers: {{0: [1], 1: [0, 3], 2: [3], 3: [2, 3]}}}}
teachers:
  coder: {{source: "megatron:{teacher}"}}
objective: {{alpha: 0.7, beta: 0.3, gamma: 1.0}}
train:
  experts: none
  norms: true
  adapters:
    - {{targets: [experts], rank: 4, alpha: 16, lr: 2, lr_b: 2}}
    - {{targets: [output_layer], rank: 3, alpha: 3, lr: 1}}
    - {{targets: [attention, router], rank: 2, alpha: 8, scaling: rslora, layers: [1, 2], lr: 1, decay: 0.5}}
"""  # noqa: E501
ALONE = RECIPE.replace("  norms: true\n", "")
EXPERTS = RECIPE[: RECIPE.index("    - {{targets: [output_layer")].replace("  norms: true\n", "")

SHARED = ("--moe-shared-expert-intermediate-size", "64")
slow = pytest.mark.slow
ETP = ("--expert-tensor-parallel-size", "2")


@pytest.fixture(scope="module")
def one(material):
    return inject(material, RECIPE)


@pytest.mark.parametrize(
    "layout",
    ["ep2", *(pytest.param(at, marks=slow) for at in ("tp2-sp", "pp2", "cp2", "full recompute"))],
)
def test_a_layout_gives_what_one_process_gives(material, one, layout):
    run = inject(material, RECIPE, **LAYOUTS[layout])
    assert PROVEN.search(run.output)
    for term in TERMS:
        assert run.losses(term) == pytest.approx(one.losses(term), rel=2e-5), term


@pytest.mark.parametrize("layout", [pytest.param(None, marks=slow), "ep2, distributed optimizer"])
def test_grouped_experts_train_as_one_by_one(material, layout):
    sizes = dict(LAYOUTS[layout]) if layout else {}
    run = grouped(material, *sizes.pop("extra", ()), recipe=EXPERTS, **sizes)
    one = inject(material, EXPERTS)
    assert PROVEN.search(run.output)
    for term in TERMS:
        assert run.losses(term) == pytest.approx(one.losses(term), rel=2e-5), term


@slow
def test_experts_may_be_divided(material, one):
    run = inject(material, RECIPE, nproc=2, tp=2, extra=ETP)
    for term in TERMS:
        assert run.losses(term) == pytest.approx(one.losses(term), rel=2e-5), term


ROWS = """
domains:
  - {{name: code, data: [1], teacher: coder, experts: {{layers: {{0: [1], 1: [0, 3]}}}}}}
teachers:
  coder: {{source: "megatron:{teacher}"}}
objective: {{alpha: 0.7, beta: 0.3, gamma: 1.0}}
train:
  experts: none
  adapters: [{{targets: [experts], rank: 4, alpha: 16, lr: 1}}]
  vocabulary_rows: {{domain: code, budget: 0.4, lr: 3}}
"""


@pytest.mark.parametrize(
    "layout",
    [
        "tp2-sp",
        *(pytest.param(at, marks=slow) for at in ("pp2", "dp2, distributed optimizer", "tp2-pp2")),
    ],
)
def test_rows_of_the_vocabulary(material, layout):
    one = inject(material, ROWS)
    run = inject(material, ROWS, **LAYOUTS[layout])
    assert PROVEN.search(run.output)
    for term in TERMS:
        assert run.losses(term) == pytest.approx(one.losses(term), rel=2e-5), term


def test_rows_by_name_or_threshold_decay(material):
    """Those of a threshold are those of their ids; and they decay where it is asked for."""
    choice = "{{domain: code, budget: 0.4, lr: 3}}"
    by_threshold = ROWS.replace(choice, "{{domain: code, threshold: 0.5}}")
    run = inject(material, by_threshold)
    found = re.search(r"^rows of the vocabulary\n +\d+: (.*)$", run.output, re.M)
    ids = [int(i) for i in found[1].split()]
    assert 0 < len(ids) < 30
    by_name = inject(material, ROWS.replace(choice, f"{{{{ids: {ids}}}}}"))
    assert by_name.losses("total loss") == run.losses("total loss")
    decayed = inject(material, ROWS.replace(choice, f"{{{{ids: {ids}, decay: 50}}}}"))
    assert decayed.losses("total loss")[0] == run.losses("total loss")[0]
    assert decayed.losses("total loss")[-1] != run.losses("total loss")[-1]


WRONG = {
    "a pattern that matches nothing": (
        RECIPE.replace("[experts]", "[experts, '*.9.mlp.*']"),
        (),
        ("train.adapters[0].targets[1]: '*.9.mlp.*' matches no matrix",),
    ),
    "two entries on one matrix": (
        RECIPE.replace("[output_layer]", "['*.experts.3.*']"),
        (),
        ("train.adapters[1]", "experts.3.linear_fc1.weight, which train.adapters[0] names too"),
    ),
    "a matrix that trains whole": (
        RECIPE.replace("norms: true", "patterns: ['*.2.self_attention.linear_proj.*']"),
        (),
        ("train.adapters[2]", "linear_proj.weight, which trains as a whole"),
    ),
    "a rank larger than a matrix": (
        RECIPE.replace("rank: 4", "rank: 65"),
        (),
        ("train.adapters[0]: has rank 65, but", "is [128, 32]; lower it"),
    ),
    "an id beyond": (
        ROWS.replace("{{domain: code, budget: 0.4, lr: 3}}", "{{ids: [3, 60, 61]}}"),
        (),
        ("train.vocabulary_rows.ids: 61 is beyond the 61 ids",),
    ),
}


@pytest.mark.parametrize(("recipe", "extra", "fragments"), WRONG.values(), ids=WRONG)
def test_a_mistake_ends_at_start(material, recipe, extra, fragments):
    """On both expert-parallel ranks, though one of them alone has the experts."""
    assert recipe not in (RECIPE, ROWS) or extra
    run = inject(material, recipe, nproc=2, ep=2, extra=extra, check=False)
    assert_clean_end(run, fragments)


@pytest.mark.parametrize(
    ("change", "extra", "fragments"),
    [
        (("rank: 4", "rank: 3"), (), ("adapters of rank 4 on", "adapters of rank 3 on")),
        (
            *(("rank: 4", "rank: 3"), ("--no-load-optim",)),
            ("train.adapters", "holds those of rank 4, alpha 16", "merge-adapters"),
        ),
        (("layers: [1, 2]", "layers: [1]"), (), ("holds the optimizer state of", "adapters of")),
    ],
    ids=["another rank", "another rank, without the optimizer", "other layers"],
)
def test_other_adapters_do_not_go_on(material, tmp_path, change, extra, fragments):
    save = str(tmp_path / "saved")
    keep = ("--save", save, "--save-interval", "2", "--train-iters", "4")
    inject(material, RECIPE, extra=(*keep, "--exit-interval", "2"))
    other = ("--inject-recipe", recipe_file(material, RECIPE.replace(*change)), "--load", save)
    run = lane.run(student_flags(*material.blend, *other, *keep, *extra), check=False)
    assert_clean_end(run, fragments)


def test_another_format_cannot_keep_them(material, tmp_path):
    flags = material.flags("--inject-recipe", recipe_file(material, RECIPE))
    at = flags.index("--load")
    anew = ("--inject-from-scratch", "--save", str(tmp_path / "s"), "--save-interval", "2")
    form = ("--ckpt-format", "torch")
    run = lane.run([*flags[:at], *flags[at + 2 :], *anew, *form], check=False)
    assert_clean_end(run, ("--ckpt-format torch", "use torch_dist"))


TIED = "--untie-embeddings-and-output-weights"


@slow
def test_rows_of_a_tied_matrix_on_two_stages(material, tmp_path):
    """First and last stage hold a copy each."""
    student = str(tmp_path / "student")
    saved = ("--data-path", material.general, "--split", "90,5,5", "--train-iters", "2")
    saved += ("--save", student, "--save-interval", "2")
    lane.run([flag for flag in student_flags(*saved) if flag != TIED])

    def run(*extra, nproc=1, **layout):
        own = ("--load", student, "--inject-recipe", recipe_file(material, ROWS))
        flags = material.flags(*own, *extra, **layout)
        return lane.run([flag for flag in flags if flag != TIED], nproc=nproc)

    one = run()
    for two in (run(nproc=2, pp=2), run(*lane.DISTRIBUTED_OPTIMIZER, nproc=4, pp=2)):
        for term in TERMS:
            assert two.losses(term) == pytest.approx(one.losses(term), rel=2e-5), term


KEPT = {
    "to another layout": (RECIPE, {"nproc": 2, "ep": 2}, {"nproc": 4, "ep": 4}, 1e-5),
    "rows, at tp 2": (ROWS, {"nproc": 2, "tp": 2}, {"nproc": 2, "tp": 2}, 0),
    "rows, from pp 2": (ROWS, {"nproc": 2, "pp": 2}, {}, 1e-5),
    "bf16, distributed optimizer": (
        *(RECIPE, *[dict(nproc=2, ep=2, extra=("--bf16", *lane.DISTRIBUTED_OPTIMIZER))] * 2, 0),
    ),
}


@pytest.mark.parametrize(
    ("recipe", "first", "then", "rel"),
    [
        pytest.param(*case, id=name, marks=[] if name == "to another layout" else slow)
        for name, case in KEPT.items()
    ],
)
def test_a_resumed_run_goes_on(material, tmp_path, recipe, first, then, rel):
    """Bitwise where the layout stays; and the original is what was loaded, of which nothing is kept
    beside where nothing but adapters train."""
    save = str(tmp_path / "saved")
    keep = ("--save", save, "--save-interval", "2", "--train-iters", "4")
    first, then = dict(first), dict(then)
    flags, more = (layout.pop("extra", ()) for layout in (first, then))
    whole = inject(material, recipe, extra=(*flags, "--train-iters", "4"), **first)
    inject(material, recipe, extra=(*flags, *keep, "--exit-interval", "2"), **first)
    nproc = then.pop("nproc", 1)
    on = ("--inject-recipe", recipe_file(material, recipe), "--load", save, *keep, *more)
    resumed = lane.run(student_flags(*material.blend, *on, **then), nproc=nproc)
    for term in TERMS:
        expected = whole.losses(term)[2:]
        assert resumed.losses(term) == (pytest.approx(expected, rel=rel) if rel else expected), term
    assert (tmp_path / "saved" / "inject_original").exists() == (recipe == RECIPE)


def test_what_is_merged_is_what_was_trained(material, tmp_path):
    """Measured at the end of the run with adapters beside, and of a student with them in it."""
    save, merged = tmp_path / "saved", tmp_path / "merged"
    measure = ("--inject-set", f"evaluation.file={tmp_path / 'run.jsonl'}", "evaluation.gate=false")
    keep = ("--save", str(save), "--save-interval", "4", *EVALUATIONS, *measure)
    inject(material, ROWS, nproc=2, tp=2, extra=keep)
    *_, beside = read_list(tmp_path / "run.jsonl")
    done = merge_adapters(CheckpointPlace("--trained", save), merged, lambda items, _: items)
    assert done.roundings
    loaded = ("--finetune", "--eval-interval", "2", "--train-iters", "4")
    alone = evaluate(material, tmp_path / "alone.json", *loaded, load=str(merged))
    start, *_ = read_list(tmp_path / "run.jsonl")
    for name, measured in alone.classes.items():
        found, before = measured.sums["loss"], start.classes[name].sums["loss"]
        assert found == pytest.approx(beside.classes[name].sums["loss"], rel=1e-5), name
        assert found != pytest.approx(before, rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no second Megatron-Core")
def test_the_other_megatron_resumes_bitwise(tmp_path):
    """Before 0.19 groups of parameters are told apart by other numbers."""
    material = make_material(tmp_path, [OTHER])
    keep = ("--save", str(tmp_path / "saved"), "--save-interval", "2", "--train-iters", "4")
    other = {"nproc": 2, "path": [OTHER]}
    whole = inject(material, RECIPE, ep=2, **other)
    one = inject(material, RECIPE, path=[OTHER])
    inject(material, RECIPE, extra=(*keep, "--exit-interval", "2"), ep=2, **other)
    on = ("--inject-recipe", recipe_file(material, RECIPE), "--load", keep[1], *keep)
    resumed = lane.run(student_flags(*material.blend, *on, ep=2), nproc=2, pythonpath=[OTHER])
    for term in TERMS:
        assert whole.losses(term) == pytest.approx(one.losses(term), rel=2e-5), term
        assert resumed.losses(term) == whole.losses(term)[2:], term
