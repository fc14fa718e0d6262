"""The gradient boundary inside and between model chunks, with recompute above it.

Students of eight layers, so that a boundary lies inside a stage and inside a virtual stage.
"""

import json
import os
import re
from pathlib import Path

import pytest

from tests.training import lane
from tests.training.conftest import make_material, student_flags

COUNTED = (str(Path(__file__).with_name("counted_gpt.py")),)
OTHER = os.environ.get("MEGATRON_OTHER")
LAYERS = 8
RECIPE = """
domains:
  - {{name: code, data: [1], experts: {{layers: {{{layer}: [3], 7: [1]}}}}}}
objective: {{alpha: 0.0, beta: 1.0}}
"""
TERMS = ("lm loss", "total loss", "load_balancing_loss", "grad norm")
MICRO_BATCHES = 3 * 4
VIRTUAL = ("--num-layers-per-virtual-pipeline-stage", "2")


def full(method: str, layers: int) -> tuple[str, ...]:
    """Flags of full recompute."""
    flags = ("--recompute-granularity", "full", "--recompute-method", method)
    return (*flags, "--recompute-num-layers", str(layers))


@pytest.fixture(scope="session")
def student(material) -> str:
    """Checkpoint of an eight-layer student, after one stock step."""
    folder = str(material.folder / "eight")
    flags = student_flags("--data-path", material.general, "--split", "90,5,5")
    layers = ("--num-layers", str(LAYERS), "--train-iters", "1")
    lane.run([*flags, *layers, "--save", folder, "--save-interval", "1"])
    return folder


def train(material, student, first: int, *extra: str, nproc=1, path=(), **layout) -> lane.Run:
    """Three counted steps in which expert 3 of layer ``first`` and expert 1 of layer 7 train."""
    recipe = material.folder / f"from-{first}.yaml"
    recipe.write_text(RECIPE.format(layer=first))
    start = ("--load", student, "--finetune", "--no-load-optim", "--no-load-rng")
    size = ("--num-layers", str(LAYERS), "--train-iters", "3", "--inject-verify-frozen")
    flags = student_flags(*material.blend, *start, *size, *extra, **layout)
    flags += ["--inject-recipe", str(recipe)]
    return lane.run(flags, nproc=nproc, script=COUNTED, pythonpath=path)


def layers_of(run: lane.Run) -> dict[int, dict[str, int]]:
    """What each global layer did."""
    found = re.findall(r"^layers: (.*)$", run.output, re.MULTILINE)
    layers = {int(layer): count for line in found for layer, count in json.loads(line).items()}
    assert sorted(layers) == list(range(LAYERS))
    return layers


def check_counts(run: lane.Run, first: int, recomputed: set[int], replicas: int = 1) -> None:
    """Below ``first`` one forward per micro-batch and nothing kept; above, recompute as asked.

    ``replicas`` share the micro-batches.
    """
    batches = MICRO_BATCHES // replicas
    for layer, count in layers_of(run).items():
        if layer < first:
            assert count == {"forwards": batches, "saved": 0, "graphs": 0}, layer
        else:
            times = 2 if layer in recomputed else 1
            assert count["forwards"] == times * batches, layer
            assert count["graphs"] == batches, layer
            assert count["saved"] > 0, layer


@pytest.fixture(scope="session")
def plain(material, student) -> dict[int, lane.Run]:
    """The curves of one process without recompute, by the first layer that trains."""
    return {first: train(material, student, first) for first in (1, 5)}


@pytest.mark.parametrize("first", [1, 5])
def test_without_recompute_nothing_is_kept_below(plain, first):
    check_counts(plain[first], first, recomputed=set())
    layers = layers_of(plain[first])
    assert layers[first]["saved"] < layers[7]["saved"] / 2, "the graph starts at the experts"


CASES = {
    "uniform 1": (5, full("uniform", 1), {}, {5, 6, 7}),
    "uniform 2": (1, full("uniform", 2), {}, set(range(1, 8))),
    "block 2": (5, full("block", 2), {}, {5, 6}),
    "first stage": (1, full("uniform", 2), dict(nproc=2, pp=2), set(range(1, 8))),
    "second stage": (5, full("uniform", 2), dict(nproc=2, pp=2), {5, 6, 7}),
    "second stage, block": (5, full("block", 1), dict(nproc=2, pp=2), {5}),
    "virtual stage": (5, (*full("uniform", 1), *VIRTUAL), dict(nproc=2, pp=2), {5, 6, 7}),
    "first virtual stage": (1, (*full("block", 1), *VIRTUAL), dict(nproc=2, pp=2), {1, 2, 4, 6}),
    "no recompute, virtual": (5, VIRTUAL, dict(nproc=2, pp=2), set()),
    "tp2-sp": (5, full("uniform", 2), dict(nproc=2, tp=2), {5, 6, 7}),
    "ep2": (5, full("uniform", 1), dict(nproc=2, ep=2), {5, 6, 7}),
    "selective": (
        5,
        ("--recompute-granularity", "selective", "--recompute-modules", "moe", "core_attn"),
        {},
        set(),
    ),
    "attention": (5, ("--recompute-granularity", "selective"), {}, set()),
}


@pytest.mark.parametrize(
    ("first", "extra", "layout", "recomputed"), [pytest.param(*c, id=k) for k, c in CASES.items()]
)
def test_recompute_trains_as_without_and_only_above(
    material, student, plain, first, extra, layout, recomputed
):
    """The balance loss is logged from all layers, so those below count theirs exactly once."""
    run = train(material, student, first, *extra, **layout)
    for term in TERMS:
        assert run.losses(term) == pytest.approx(plain[first].losses(term), rel=2e-5), term
    assert "bitwise unchanged" in run.output
    check_counts(run, first, recomputed, replicas=layout.get("ep", 1))


def test_dropout_draws_the_same_numbers_with_recompute(material, student):
    dropout = ("--hidden-dropout", "0.1", "--attention-dropout", "0.1")
    one, two = (train(material, student, 5, *dropout, *extra) for extra in ((), full("uniform", 2)))
    for term in TERMS:
        assert one.losses(term) == two.losses(term), term


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no second Megatron-Core")
def test_the_other_supported_megatron_splits_the_block_too(tmp_path, plain):
    """With its own checkpoints: those of a newer Megatron cannot be read by an older one."""
    material = make_material(tmp_path, [OTHER])
    folder = str(tmp_path / "eight")
    flags = student_flags("--data-path", material.general, "--split", "90,5,5")
    layers = ("--num-layers", str(LAYERS), "--train-iters", "1")
    lane.run([*flags, *layers, "--save", folder, "--save-interval", "1"], pythonpath=[OTHER])
    run = train(material, folder, 5, *full("uniform", 2), nproc=2, pp=2, path=[OTHER])
    check_counts(run, 5, {5, 6, 7})
    for term in TERMS:
        assert run.losses(term) == pytest.approx(plain[5].losses(term), rel=2e-5), term
