"""``--overlap-moe-expert-parallel-comm``: in one layout the same numbers with and without, bit for
bit."""

import json

import pytest

from tests.harness import lane
from tests.harness.grouped import TWO_OF_FOUR, grouped
from tests.harness.injection import OTHER, PROVEN, RECIPE, inject, recipe_file
from tests.harness.material import make_material

COUNTED = (str(lane.HARNESS / "planned_gpt.py"),)
OVERLAP = ("--overlap-moe-expert-parallel-comm",)
EP2 = dict(nproc=2, ep=2)
VIRTUAL = dict(nproc=4, pp=2, ep=2, extra=("--num-layers-per-virtual-pipeline-stage", "1"))
EVERYTHING = (
    RECIPE.replace("{{2: [3], 3: [3]}}", "{{1: [0], 2: [1]}}").replace("0.3,", "0.3, gamma: 1.0,")
    + "steering: {{coeff: 0.05, target_mass: 0.5, retention: 0.1, confidence: label}}\n"
    + "train: {{router: true, output_layer: true}}\n"
    + "retention: {{l2: 0.01, experts: 0.5}}\n"
)
LAST_RANK, FIRST_RANK = RECIPE, EVERYTHING
"""Of the expert-parallel ranks only this one has an expert that trains."""
NO_RANK = RECIPE + "train: {{experts: none, norms: true}}\n"
LAST_LAYER = RECIPE.replace("2: [3], 3: [3]", "3: [0]")
HEAD = RECIPE + "train: {{experts: none, output_layer: true}}\n"
FROM_SCRATCH = ("--load", "/nothing/there", "--inject-from-scratch")


def pair(material, recipe, *extra, layout=EP2, **options):
    """A run without the flag and one with it, in bf16, each with the frozen check."""
    extra = ("--bf16", *layout.get("extra", ()), *extra)
    given = {**layout, **options}
    without = inject(material, recipe, **{**given, "extra": extra})
    return without, inject(material, recipe, **{**given, "extra": (*extra, *OVERLAP)})


def assert_alike(without, overlapped):
    lane.same_runs(without, overlapped)
    for run in (without, overlapped):
        assert PROVEN.search(run.output)
        assert "kd loss/code" in run.iterations[0]


@pytest.mark.parametrize("recipe", [LAST_RANK, FIRST_RANK], ids=["last rank", "first rank"])
def test_terms_and_gradients(material, recipe):
    assert_alike(*pair(material, recipe))


@pytest.mark.parametrize(
    "layout",
    [EP2, pytest.param(VIRTUAL, marks=pytest.mark.slow)],
    ids=["ep2", "pp2-vpp2-ep2"],
)
def test_below_the_boundary_nothing_is_kept_and_nothing_runs_backward(material, layout):
    """Layers 2 and 3 train: each has four nodes, and each rank two micro-batches in two steps."""
    sizes = {name: layout[name] for name in ("pp", "ep") if name in layout}
    ours = ("--inject-recipe", recipe_file(material, RECIPE), "--train-iters", "2")
    flags = material.flags("--bf16", *ours, *OVERLAP, *layout.get("extra", ()), **sizes)
    run = lane.run(flags, nproc=layout["nproc"], script=COUNTED)
    lines = [line for line in run.output.splitlines() if line.startswith("plans: ")]
    assert len(lines) == layout["nproc"]
    layers = [layer for line in lines for layer in json.loads(line[len("plans: ") :]).items()]
    assert sorted(int(number) for number, _ in layers) == [0, 0, 1, 1, 2, 2, 3, 3]
    for number, count in layers:
        assert count["forwards"] == 16
        assert count["backwards"] == (16 if int(number) >= 2 else 0)
        assert (count["saved"] > 0) == (int(number) >= 2)


def test_what_a_layer_puts_out_cannot_be_imitated(material):
    recipe = RECIPE + "imitation: {{hidden: 0.5}}\n"
    run = inject(material, recipe, extra=("--bf16", *OVERLAP), check=False, **EP2)
    assert run.returncode == 2, run.tail()
    assert "--overlap-moe-expert-parallel-comm: runs layers in parts" in run.output
    assert "set imitation.hidden to 0" in run.output


@pytest.mark.slow
@pytest.mark.parametrize("layout", [EP2, VIRTUAL], ids=["ep2", "pp2-vpp2-ep2"])
@pytest.mark.parametrize("recipe", [NO_RANK, LAST_LAYER, HEAD], ids=["norms", "last layer", "head"])
def test_where_backward_stops(material, recipe, layout):
    """At the first layer, at the last, and behind it."""
    assert_alike(*pair(material, recipe, layout=layout))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [LAST_RANK, FIRST_RANK], ids=["last rank", "first rank"])
@pytest.mark.parametrize(
    "layout",
    [VIRTUAL, dict(nproc=4, tp=2, ep=2), dict(nproc=4, cp=2, ep=2)],
    ids=["pp2-vpp2-ep2", "tp2-sp-ep2", "cp2-ep2"],
)
def test_layouts(material, recipe, layout):
    assert_alike(*pair(material, recipe, "--global-batch-size", "16", layout=layout))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        lane.DISTRIBUTED_OPTIMIZER,
        (*lane.DEEPSEEK_ROUTER, "--mtp-num-layers", "1", *FROM_SCRATCH),
        ("--moe-layer-freq", "([0]*1+[1]*3)", "--global-batch-size", "24", *FROM_SCRATCH),
        ("--recompute-granularity", "selective", "--recompute-modules", "core_attn"),
    ],
    ids=["distributed optimizer", "DeepSeek with MTP", "dense layer", "selective recompute"],
)
def test_students(material, flags):
    assert_alike(*pair(material, RECIPE, *flags))


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["params", "fp8"])
def test_grouped_experts(material, frozen):
    recipe = TWO_OF_FOUR + f"train: {{{{frozen_experts: {frozen}}}}}\n"
    runs = [grouped(material, "--bf16", *f, recipe=recipe, **EP2) for f in ((), OVERLAP)]
    assert_alike(*runs)


@pytest.mark.slow
def test_off_is_stock():
    flags = [*lane.moe("--bf16", *OVERLAP, ep=2)]
    stock = lane.run(flags, nproc=2, env={"STOCK_MEGATRON": "1"}, fresh=True)
    lane.same_runs(lane.run(flags, nproc=2), stock)


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no second Megatron-Core")
def test_the_other_supported_megatron(tmp_path):
    material = make_material(tmp_path, [OTHER])
    assert_alike(*pair(material, EVERYTHING, path=[OTHER]))
    assert_alike(*pair(material, LAST_RANK, path=[OTHER], layout=VIRTUAL))
