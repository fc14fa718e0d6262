"""The gradient boundary inside and between model chunks, with recompute above it.

Students of eight layers, so that a boundary lies inside a stage and inside a virtual stage.
"""

import functools
import json
import os
import re
from collections.abc import Callable

import pytest

from tests.harness import lane
from tests.harness.material import make_material, student_flags

COUNTED = (str(lane.HARNESS / "counted_gpt.py"),)
OTHER = os.environ.get("MEGATRON_OTHER")
LAYERS = 8
RECIPE = """
domains:
  - {{name: code, data: [1], experts: {{layers: {{{layer}: [3], 7: [1]}}}}}}
objective: {{alpha: 0.0, beta: 1.0}}
"""
TERMS = ("lm loss", "total loss", "load_balancing_loss", "grad norm")
MICRO_BATCHES = 3 * 4
TIED = "--untie-embeddings-and-output-weights"
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


def train(
    material, student, first: int, *extra: str, nproc=1, path=(), without=(), **layout
) -> lane.Run:
    """Three counted steps in which expert 3 of layer ``first`` and expert 1 of layer 7 train.

    ``without`` takes flags out, each with its value.
    """
    recipe = material.folder / f"from-{first}.yaml"
    recipe.write_text(RECIPE.format(layer=first))
    start = ("--load", student, "--finetune", "--no-load-optim", "--no-load-rng")
    size = ("--num-layers", str(LAYERS), "--train-iters", "3", "--inject-verify-frozen")
    flags = student_flags(*material.blend, *start, *size, *extra, **layout)
    flags += ["--inject-recipe", str(recipe)]
    for flag in without:
        while flag in flags:
            at = flags.index(flag)
            del flags[at : at + 1 + (not flags[at + 1].startswith("--"))]
    return lane.run(flags, nproc=nproc, script=COUNTED, pythonpath=path)


def layers_of(run: lane.Run) -> dict[int, dict[str, int]]:
    """What each global layer did."""
    found = re.findall(r"^layers: (.*)$", run.output, re.MULTILINE)
    layers = {int(layer): count for line in found for layer, count in json.loads(line).items()}
    assert sorted(layers) == list(range(LAYERS))
    return layers


def pipeline_of(run: lane.Run) -> list[dict[str, int]]:
    """What each rank's stage sent and received, by global rank."""
    found = map(json.loads, re.findall(r"^pipeline: (.*)$", run.output, re.MULTILINE))
    return sorted(found, key=lambda messages: messages["rank"])


def check_messages(
    run: lane.Run, forward_stages: int, pp: int, chunks: int = 1, replicas: int = 1, batches=None
) -> None:
    """Gradients go down the edges above the first ``forward_stages`` stages and no others.

    Nothing that torch.distributed moved between stages goes uncounted. ``replicas`` pipelines,
    with neighbouring ranks in one stage, share the micro-batches ``batches``.
    """
    batches = (MICRO_BATCHES if batches is None else batches) // replicas
    stages = pp * chunks
    for messages in pipeline_of(run):
        own = range(messages["rank"] // replicas, stages, pp)
        edges_up = sum(stage < stages - 1 for stage in own)
        edges_down = sum(stage > 0 for stage in own)
        received = sum(forward_stages <= stage < stages - 1 for stage in own)
        sent = sum(stage > forward_stages for stage in own)
        assert messages["forward"] == edges_up * batches, messages
        assert messages["backward"] == sent * batches, messages
        assert messages["received"] == received * batches, messages
        assert messages["operations"] == (edges_up + edges_down + sent + received) * batches
        assert (messages["bytes"] > 0) == (sent > 0)


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
def plain(material, student) -> Callable[..., lane.Run]:
    """The curve of one process without recompute, by the first layer that trains; each once."""
    return functools.cache(lambda first, *extra: train(material, student, first, *extra))


@pytest.mark.parametrize("first", [1, 5])
def test_without_recompute_nothing_is_kept_below(plain, first):
    check_counts(plain(first), first, recomputed=set())
    layers = layers_of(plain(first))
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
SLOW_CASES = (  # each between two that stay: the same method, layout or position
    *("uniform 1", "block 2", "second stage", "virtual stage", "no recompute, virtual"),
    "attention",
)


@pytest.mark.parametrize(
    ("first", "extra", "layout", "recomputed"),
    [
        pytest.param(*c, id=k, marks=[pytest.mark.slow] if k in SLOW_CASES else [])
        for k, c in CASES.items()
    ],
)
def test_recompute_trains_as_without_and_only_above(
    material, student, plain, first, extra, layout, recomputed
):
    """The balance loss is logged from all layers, so those below count theirs exactly once."""
    run = train(material, student, first, *extra, **layout)
    for term in TERMS:
        assert run.losses(term) == pytest.approx(plain(first).losses(term), rel=2e-5), term
    assert "bitwise unchanged" in run.output
    check_counts(run, first, recomputed, replicas=layout.get("ep", 1))
    if layout.get("pp", 1) > 1:
        stages = 4 if "--num-layers-per-virtual-pipeline-stage" in extra else 2
        check_messages(run, first * stages // LAYERS, 2, stages // 2)


PIPELINES = {
    "first layer of a stage": (4, (), dict(nproc=2, pp=2), 1),
    "last layer": (7, (), dict(nproc=2, pp=2), 1),
    "bf16, distributed optimizer": (
        5,
        ("--bf16", *lane.DISTRIBUTED_OPTIMIZER),
        dict(nproc=2, pp=2),
        1,
    ),
    "first layer of a virtual stage": (4, VIRTUAL, dict(nproc=2, pp=2), 2),
    "four stages": (5, (), dict(nproc=4, pp=4), 2),
    "four stages, second": (2, (), dict(nproc=4, pp=4), 1),
    "four stages, virtual": (
        5,
        ("--num-layers-per-virtual-pipeline-stage", "1"),
        dict(nproc=4, pp=4),
        5,
    ),
    "four stages, virtual, no overlap": (
        5,
        ("--num-layers-per-virtual-pipeline-stage", "1", "--no-overlap-p2p-communication"),
        dict(nproc=4, pp=4),
        5,
    ),
    "four stages, virtual, overlap in warm-up": (
        5,
        (
            "--num-layers-per-virtual-pipeline-stage",
            "1",
            "--overlap-p2p-communication-warmup-flush",
        ),
        dict(nproc=4, pp=4),
        5,
    ),
    "ep2": (5, (), dict(nproc=4, pp=2, ep=2), 1),
}


SELDOM = ("last layer", "bf16, distributed optimizer")


@pytest.mark.parametrize(
    ("first", "extra", "layout", "forward_stages"),
    [
        pytest.param(*c, id=k, marks=[pytest.mark.slow] if c[2]["nproc"] > 2 or k in SELDOM else [])
        for k, c in PIPELINES.items()
    ],
)
def test_stages_below_run_forward_only(
    material, student, plain, first, extra, layout, forward_stages
):
    """The curve is one process's; nothing moves or is kept for a backward below."""
    precision = tuple(flag for flag in extra if flag == "--bf16")
    run = train(material, student, first, *extra, **layout)
    for term in TERMS:
        rel = 5e-3 if precision else 2e-5
        assert run.losses(term) == pytest.approx(plain(first, *precision).losses(term), rel=rel), (
            term
        )
    assert "bitwise unchanged" in run.output
    replicas = layout.get("ep", 1)
    check_counts(run, first, recomputed=set(), replicas=replicas)
    pp = layout["pp"]
    virtual = "--num-layers-per-virtual-pipeline-stage" in extra
    chunks = LAYERS // pp // int(extra[extra.index(VIRTUAL[0]) + 1]) if virtual else 1
    check_messages(run, forward_stages, pp, chunks, replicas)
    for messages in pipeline_of(run):
        stages = range(messages["rank"] // replicas, pp * chunks, pp)
        # A stage at or below the boundary has let go of what it received.
        above = [s for s in stages if s > 0 and first < s * LAYERS // (pp * chunks)]
        assert messages["kept"] == len(above) * MICRO_BATCHES // replicas


@pytest.mark.parametrize(
    ("batches", "extra"),
    [
        pytest.param(1, (), id="1"),
        pytest.param(2, (), id="2", marks=pytest.mark.slow),
        pytest.param(16, (), id="16", marks=pytest.mark.slow),
        pytest.param(2, VIRTUAL, id="2, virtual"),
        pytest.param(6, VIRTUAL, id="6, virtual", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_micro_batches_passes(material, student, plain, batches, extra):
    """Fewer than stages, as many, and more."""
    size = ("--global-batch-size", str(2 * batches))
    one = plain(5, *size)
    two = train(material, student, 5, *size, *extra, nproc=2, pp=2)
    for term in TERMS:
        assert two.losses(term) == pytest.approx(one.losses(term), rel=2e-5), term
    forward, chunks = (2, 2) if extra else (1, 1)
    check_messages(two, forward, 2, chunks, batches=3 * batches)


def test_batches_that_grow_pass(material, student):
    """One micro-batch, then more, of which each step's schedule has its own number."""
    growing = ("--step-batch-size-schedule", "0:2 128:4", "--train-samples", "12")
    without = ("--train-iters", "--global-batch-size")
    one, two = (
        train(material, student, 5, *growing, without=without, **at)
        for at in ({}, dict(nproc=2, pp=2))
    )
    assert one.losses("global batch size") == [2, 2, 4, 4]
    for term in TERMS:
        assert two.losses(term) == pytest.approx(one.losses(term), rel=2e-5), term
    check_messages(two, 1, 2, batches=6)


@pytest.mark.slow
def test_embedding_and_head_may_share_a_frozen_matrix(material, tmp_path):
    save = str(tmp_path / "tied")
    tied = student_flags("--data-path", material.general, "--split", "90,5,5")
    tied.remove(TIED)
    size = ("--num-layers", str(LAYERS), "--train-iters", "1")
    lane.run([*tied, *size, "--save", save, "--save-interval", "1"])
    runs = []
    for layout in ({}, dict(nproc=2, pp=2)):
        run = train(material, save, 5, without=(TIED,), **layout)
        assert "bitwise unchanged" in run.output
        runs.append(run)
    for term in TERMS:
        assert runs[1].losses(term) == pytest.approx(runs[0].losses(term), rel=2e-5), term
    check_messages(runs[1], 1, 2)


ENDS_ALONE = ("--pipeline-model-parallel-layout", "E|tttt|tttt|L")


@pytest.mark.parametrize(
    ("component", "extra", "forward_stages"),
    [
        ("embedding", (), 0),
        pytest.param("output_layer", (), 1, marks=pytest.mark.slow),
        pytest.param("output_layer", ENDS_ALONE, 3, marks=pytest.mark.slow),
        pytest.param("embedding", ENDS_ALONE, 0, marks=pytest.mark.slow),
    ],
)
def test_the_boundary_may_be_an_end_of_the_model(
    material, student, plain, component, extra, forward_stages
):
    """With the embedding training all gradients go down; with the head alone, none.

    Also where embedding and head are virtual stages without layers.
    """
    alone = ("--inject-set", "train.experts=none", f"train.{component}=true")
    one = plain(5, *alone)
    two = train(material, student, 5, *extra, *alone, nproc=2, pp=2)
    for term in TERMS:
        assert two.losses(term) == pytest.approx(one.losses(term), rel=2e-5), term
    check_messages(two, forward_stages, 2, chunks=2 if extra else 1)


@pytest.mark.slow
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
    for extra, recomputed, stages in ((full("uniform", 2), {5, 6, 7}, 2), (VIRTUAL, set(), 4)):
        run = train(material, folder, 5, *extra, nproc=2, pp=2, path=[OTHER])
        check_counts(run, 5, recomputed)
        check_messages(run, stages // 2, 2, stages // 2)
        for term in TERMS:
            assert run.losses(term) == pytest.approx(plain(5).losses(term), rel=2e-5), term
