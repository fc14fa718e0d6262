"""Features that had not run on a GPU when this was written (November 2026), in TE's layers.

Each run must end, near the CPU lane's in fp32, with what is frozen unchanged, and without a wait of
the host in the package but those of ``pretended_gpu.rules.NEEDED``. The first test tells all
outcomes.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.harness import lane
from tests.harness.gpu_runs import BF16, ON_CPU
from tests.harness.injection import PROVEN
from tests.harness.newer_features import NEWER, make_apart
from tests.harness.pretended_gpu.rules import NEEDED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
AT_ONCE = 6
TIMEOUT = 300.0
OF_THE_LANE = {"everything": 3e-2}
"""How far from the lane's numbers in fp32, where it is not one in a hundred."""


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> dict[tuple[str, bool], lane.Run | str]:
    """Each feature on the GPU and on the lane: the run, or why there is none."""
    kept = os.environ.get("GPU_MODELS")
    made = make_apart(tmp_path_factory.mktemp("made") if kept is None else Path(kept) / "features")

    def run(name: str, on_gpu: bool) -> lane.Run | str:
        flags = made.flags(name, *(BF16 if on_gpu else ()), on_gpu=on_gpu)
        if on_gpu:
            flags = [flag for flag in flags if flag != "--use-cpu-initialization"]
        how = {"options": (), "env": {"TESTS_REPORT_SYNCS": "1"}}
        if not on_gpu:
            how = {"options": ("--cpu",), "env": ON_CPU}
        try:
            return lane.run(flags, fresh=True, timeout=TIMEOUT, **how)
        except AssertionError as error:
            return str(error)

    wanted = [(name, on_gpu) for name in NEWER for on_gpu in (True, False)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(wanted, pool.map(lambda case: run(*case), wanted), strict=True))


def ended(runs, name: str, on_gpu: bool = True) -> lane.Run:
    run = runs[name, on_gpu]
    if isinstance(run, str):
        pytest.fail(run[-3000:])
    return run


def test_every_feature(runs):
    """First of all: what ran, how long it took, and what it logged last."""
    for (name, on_gpu), run in runs.items():
        where = "GPU" if on_gpu else "lane"
        if isinstance(run, str):
            print(f"{name:30} {where:5} FAILED\n{run[-1500:]}")
            continue
        last = {term: round(run.losses(term)[-1], 4) for term in ("lm loss", *NEWER[name].terms)}
        step = run.losses("elapsed time per iteration (ms)")[-1]
        print(f"{name:30} {where:5} {run.seconds:5.1f} s, last step {step:7.1f} ms  {last}")
        for line in run.output.splitlines():
            if line.startswith("host sync"):
                print("   ", line)
    assert [case for case, run in runs.items() if isinstance(run, str)] == []


@pytest.mark.parametrize("name", NEWER)
def test_bf16_is_near_the_lane(runs, name):
    ours, theirs = ended(runs, name), ended(runs, name, on_gpu=False)
    for term in ("lm loss", *NEWER[name].terms):
        near = lane.approx(theirs.losses(term), rel=OF_THE_LANE.get(name, 1e-2), abs=1e-3)
        assert ours.losses(term) == near, term


@pytest.mark.parametrize("name", NEWER)
def test_what_is_frozen_stays(runs, name):
    run = ended(runs, name)
    assert bool(PROVEN.search(run.output)) is NEWER[name].freezes


@pytest.mark.parametrize("name", NEWER)
def test_the_host_waits_nowhere_else(runs, name):
    output = ended(runs, name).output
    assert re.search(r"host waits seen, Megatron's included: [1-9]", output), "nothing was watched"
    allowed = {(file, function.rpartition(".")[2]) for file, function in NEEDED}
    for line in output.splitlines():
        if found := re.match(r"host sync: .*?(megatron_moe_inject/\S+):\d+ (\S+)", line):
            assert found.groups() in allowed, line
