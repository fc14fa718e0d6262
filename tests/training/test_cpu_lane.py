"""The CPU lane: real training at every layout gives one curve, and stock behaviour is kept."""

import math
from pathlib import Path

import numpy as np
import pytest

from tests.harness import lane
from tests.harness.lane import same_runs

LAYERS = ("--num-layers", "4")
VIRTUAL_PIPELINE = ("--num-layers-per-virtual-pipeline-stage", "1")
FULL_RECOMPUTE = (
    *("--recompute-granularity", "full", "--recompute-method", "uniform"),
    *("--recompute-num-layers", "1"),
)
SELECTIVE_RECOMPUTE = ("--recompute-granularity", "selective")
DEEPSEEK = (*lane.DEEPSEEK_ROUTER, "--mtp-num-layers", "1", "--bf16")
RESHARDABLE = (*lane.DISTRIBUTED_OPTIMIZER, "--dist-ckpt-optim-fully-reshardable")


def close_runs(run: lane.Run, reference: lane.Run, relative: float = 1e-5) -> None:
    """Both runs logged the same losses, grad norms and evaluations within ``relative``."""
    last = len(run.iterations)
    assert last > 0
    for ours, theirs in zip(run.iterations, reference.iterations[-last:], strict=True):
        assert ours["iteration"] == theirs["iteration"]
        for name in ("lm loss", "load_balancing_loss", "grad norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=relative), (name, ours, theirs)
    assert run.evaluations
    for ours, theirs in zip(run.evaluations, reference.evaluations, strict=True):
        assert ours == pytest.approx(theirs, rel=relative)


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> str:
    """Checkpoint of one process after the first step: the same start for every layout."""
    folder = str(tmp_path_factory.mktemp("start"))
    stop = ("--save", folder, "--save-interval", "1", "--exit-interval", "1")
    lane.run(lane.moe(*LAYERS, *stop))
    return folder


def continued(start: str, *extra: str, nproc: int, **layout: int) -> lane.Run:
    """Two more steps and an evaluation from ``start``, at another layout."""
    load = ("--load", start, "--no-load-optim", "--no-load-rng")
    return lane.run(lane.moe(*LAYERS, *load, *extra, **layout), nproc=nproc)


@pytest.fixture(scope="session")
def single(start) -> lane.Run:
    """The curve of one process."""
    return continued(start, nproc=1)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("nproc", "layout", "extra"),
    [
        pytest.param(2, {"tp": 2, "ep": 2}, FULL_RECOMPUTE, id="tp-sp-ep-full-recompute"),
        pytest.param(2, {"pp": 2}, VIRTUAL_PIPELINE, id="virtual-pp"),
        pytest.param(2, {"cp": 2}, SELECTIVE_RECOMPUTE, id="cp-selective-recompute", marks=slow),
        pytest.param(
            2, {"ep": 2}, lane.DISTRIBUTED_OPTIMIZER, id="ep-distributed-optimizer", marks=slow
        ),
        pytest.param(2, {"pp": 2}, (), id="pp", marks=slow),
        pytest.param(2, {"tp": 2}, (), id="tp-sp", marks=slow),
        pytest.param(2, {"cp": 2, "ep": 2}, FULL_RECOMPUTE, id="cp-ep-recompute"),
        pytest.param(4, {"cp": 4}, (), id="cp4", marks=slow),
        pytest.param(4, {"tp": 2, "pp": 2, "ep": 2}, VIRTUAL_PIPELINE, id="tp-pp-ep", marks=slow),
        pytest.param(4, {"tp": 2, "cp": 2}, RESHARDABLE, id="tp-cp-optimizer", marks=slow),
    ],
)
def test_loss_does_not_depend_on_the_layout(start, single, nproc, layout, extra):
    close_runs(continued(start, *extra, nproc=nproc, **layout), single)


def test_grouped_queries_and_masks_survive_context_parallelism(tmp_path):
    few_groups = ("--group-query-attention", "--num-query-groups", "2")
    save = ("--save", str(tmp_path), "--save-interval", "1", "--exit-interval", "1")
    lane.run(lane.dense(*few_groups, *save))
    load = ("--load", str(tmp_path), *few_groups, "--reset-attention-mask")
    one, two = (lane.run(lane.dense(*load, cp=cp), nproc=cp) for cp in (1, 2))
    assert two.losses() == pytest.approx(one.losses(), rel=1e-5)
    assert two.losses("grad norm") == pytest.approx(one.losses("grad norm"), rel=1e-5)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> tuple[str, lane.Run]:
    """Three steps at EP 2 with the distributed optimizer; the checkpoint is of the second."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    save = ("--save", str(folder), "--save-interval", "2")
    run = lane.run(lane.moe(*LAYERS, *RESHARDABLE, *save, ep=2), nproc=2)
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    return str(folder), run


def test_resume_continues_bit_for_bit(uninterrupted):
    folder, reference = uninterrupted
    flags = lane.moe(*LAYERS, *RESHARDABLE, "--load", folder, ep=2)
    run = lane.run(flags, nproc=2)
    reference = lane.Run(0, "", reference.iterations[2:], reference.evaluations)
    same_runs(run, reference)


def test_checkpoint_with_optimizer_loads_at_another_layout(uninterrupted):
    folder, reference = uninterrupted
    flags = lane.moe(*LAYERS, *RESHARDABLE, "--load", folder, tp=2, ep=2)
    close_runs(lane.run(flags, nproc=2), reference)


@pytest.mark.parametrize("layout", [{"pp": 2}, {"tp": 2}])
def test_expert_parallel_checkpoint_loads_without_expert_parallelism(uninterrupted, layout):
    folder, reference = uninterrupted
    flags = lane.moe(*LAYERS, "--load", folder, "--no-load-optim", **layout)
    run = lane.run(flags, nproc=2)
    first, expected = run.iterations[0], reference.iterations[2]
    assert first["lm loss"] == pytest.approx(expected["lm loss"], rel=1e-5)
    assert first["grad norm"] == pytest.approx(expected["grad norm"], rel=1e-5)


def test_random_streams_continue_after_resume(tmp_path):
    dropout = ("--hidden-dropout", "0.1", "--attention-dropout", "0.1")
    save = ("--save", str(tmp_path), "--save-interval", "2")
    whole = lane.run(lane.dense(*dropout, *save, tp=2), nproc=2)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    rest = lane.run(lane.dense(*dropout, "--load", str(tmp_path), tp=2), nproc=2)
    same_runs(rest, lane.Run(0, "", whole.iterations[2:], whole.evaluations))


def test_overlapped_expert_communication_computes_the_same():
    plain = lane.moe("--bf16", ep=2)
    overlapped = lane.run([*plain, "--overlap-moe-expert-parallel-comm"], nproc=2)
    same_runs(overlapped, lane.run(plain, nproc=2))


def test_deepseek_like_model_trains_in_bf16():
    flags = lane.moe(*DEEPSEEK, *lane.DISTRIBUTED_OPTIMIZER, "--train-iters", "6", ep=2)
    run = lane.run([*flags, "--lr", "1e-2"], nproc=2)
    assert len(run.iterations) == 6
    for name in ("lm loss", "mtp_1 loss"):
        assert all(math.isfinite(x) for x in run.losses(name))
        assert run.losses(name)[-1] < run.losses(name)[0] - 0.05
    assert all(x > 0 for x in run.losses("grad norm"))


def write_documents(prefix: Path, end_of_document: int) -> str:
    """A dataset of documents of uneven length that end as ``NullTokenizer``'s do."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in rng.integers(3, 30, size=300):
        tokens = rng.integers(end_of_document, size=length)
        tokens[-1] = end_of_document
        builder.add_document(torch.from_numpy(tokens), [int(length)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_packed_documents_train_like_masked_ones(tmp_path):
    flags = [flag for flag in lane.moe() if flag != "--mock-data"]
    data = write_documents(tmp_path / "documents", end_of_document=126)
    flags += ["--data-path", data, "--split", "80,10,10"]
    packed = lane.run([*flags, "--dataloader-inter-document-masking"])
    masked = lane.run([*flags, "--reset-attention-mask", "--reset-position-ids"])
    close_runs(packed, masked)
    blind = lane.run(flags)
    assert blind.losses()[0] != pytest.approx(masked.losses()[0], rel=1e-5)


def test_device_stand_ins_keep_the_semantics():
    script = lane.HARNESS / "device_checks.py"
    assert "all device checks passed" in lane.run((), script=(str(script),)).output


def test_unsupported_flags_end_in_one_message():
    run = lane.run(lane.moe("--moe-grouped-gemm"), check=False)
    assert run.returncode == 1
    assert "moe-inject: not on the CPU lane: --moe-grouped-gemm (is True): " in run.output
    assert "Traceback" not in run.output


@pytest.mark.slow
@pytest.mark.parametrize("layout", [dict(tp=2), dict(tp=2, pp=2)], ids=str)
def test_evaluation_in_micro_batches_of_another_size(material, layout):
    """Ranks that read no data are told how many samples come; the numbers are the same."""
    sizes = ("--eval-micro-batch-size", "4", "--eval-global-batch-size", "8", "--eval-iters", "2")
    nproc = 2 * layout.get("pp", 1)
    runs = [
        lane.run(material.flags(*extra, "--eval-interval", "2", **layout), nproc=nproc)
        for extra in (("--eval-iters", "2"), sizes)
    ]
    alike, other = runs
    assert other.losses("lm loss") == alike.losses("lm loss")
    assert len(other.evaluations) == len(alike.evaluations) == 4
    for ours, theirs in zip(other.evaluations, alike.evaluations, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
