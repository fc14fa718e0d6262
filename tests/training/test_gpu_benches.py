"""The benchmarks for one GPU, as far as a machine without one shows."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "benchmarks" / "gpu"


@pytest.fixture
def module(monkeypatch):
    """Imports a benchmark by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.slow
def test_every_arm_steps(tmp_path):
    """A tiny run of the command on the CPU lane."""
    small = "--layers 2 --hidden 64 --ffn 64 --experts 4 --topk 2 --chosen 1 --heads 4 --seq 64"
    more = "--vocab 512 --teacher-layers 1 --teacher-hidden 64 --teacher-ffn 64 --precisions bf16"
    few = "--steps 2 --warm-up 1 --start-timeout 1200"
    out = tmp_path / "out.json"
    command = [sys.executable, str(FOLDER / "step_bench.py"), *small.split(), *more.split()]
    done = subprocess.run(
        [*command, *few.split(), "--json", str(out), "--logs", str(tmp_path / "logs")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["arm"]: row for row in json.loads(out.read_text())["rows"]}
    named = {"stock", "off", "freeze", "kd", "gamma", "host", "steering", "features"}
    named |= {"bare", "adapters", "grouped", "domain", "retained", "imitated", "everything"}
    assert set(rows) == named
    assert {arm: row["ended"] for arm, row in rows.items() if "ended" in row} == {}
    assert all(len(row["seconds"]) == 2 for row in rows.values()), rows
    chosen = 2 * 3 * 64 * 64
    assert rows["kd"]["trained"] == chosen
    assert rows["steering"]["trained"] == chosen + 2 * 64
    layer = 4 * 3 * 64 * 64 + 4 * 64 * 64 + 4 * 64 + 2 * 64  # experts, attention, router, norms
    everything = 2 * layer + 64 + 2 * 512 * 64
    for arm in ("stock", "off", "everything"):
        assert rows[arm]["trained"] == everything, arm
    assert "| bf16 | + teacher, distillation alone |" in done.stdout


def test_shares_are_of_the_arm_that_is_added_to(module):
    bench = module("step_bench")
    seconds = {"stock": [2.0, 4.0, 3.0], "kd": [1.5, 1.5, 9.0], "gamma": [1.8, 1.8, 1.8]}
    rows = [
        {
            "precision": "bf16",
            "round": 0,
            "arm": arm,
            "title": bench.ARMS[arm].title,
            "seconds": times,
            "built_bytes": 2**30,
            "peak_bytes": 3 * 2**29,
        }
        for arm, times in seconds.items()
    ]
    for row, device in zip(rows, (2.0, 1.0, 1.5), strict=True):
        row |= {"device_seconds": device, "launches": 7}
    slower = {"seconds": [6.0, 6.0, 6.0], "round": 1}
    rows.append(rows[0] | slower)
    rows.append(rows[2] | slower | {"arm": "features", "title": "features"})
    rows.append({"precision": "fp8", "round": 0, "arm": "kd", "title": "kd", "ended": "crashes"})
    sizes = {"global-batch": 4, "seq": 300}
    lines = bench.render({"machine": "m", "sizes": sizes, "rows": rows})
    table = [[cell.strip() for cell in line.split("|")[3:-1]] for line in lines if "|" in line][2:]
    end = ["1.00", "1.50"]
    assert table[0] == ["3000.0", "1.000", "", "2000.0", "1.000", "", "7", "400", *end]
    assert table[1] == ["1500.0", "0.500", "", "1000.0", "0.500", "", "7", "800", *end]
    assert table[2] == ["1800.0", "0.600", "1.200", "1500.0", "0.750", "1.500", "7", "667", *end]
    assert table[3][:3] == ["6000.0", "1.000", ""], "beside its own round's stock; no kd there"
    assert table[4][0] == "crashes"


def test_a_traced_step_tells_how_long_the_device_was_busy(module, monkeypatch):
    """The profiler's events are stood in for: what overlaps counts once."""
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    worker = module("freeze_worker")
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(kind, name, start, end, annotation=False):
        found = types.SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return types.SimpleNamespace(
            device_type=kind, name=name, time_range=found, self_cpu_time_total=end - start,
            is_user_annotation=annotation,
        )  # fmt: skip

    events = [
        *(event(cuda, "gemm", 0, 1000), event(cuda, "copy", 500, 1500)),
        *(event(cuda, "gemm", 3000, 4000), event(cuda, "step", 0, 9000, True)),
        event(cpu, "aten::mm", 0, 250),
    ]
    profiler = types.SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: contextlib.nullcontext(profiler))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    result, found = worker.traced(lambda: "done")
    assert result == "done"
    assert found["device_seconds"] == pytest.approx(2.5e-3)
    assert found["launches"] == 3
    assert found["kernels"] == [["gemm", 2.0, 2], ["copy", 1.0, 1]]


def test_traces_of_several_steps_are_averaged(module):
    bench = module("step_bench")
    traces = [
        {"device_seconds": 2.0, "launches": 7, "kernels": [["gemm", 4.0, 2]]},
        {"device_seconds": 4.0, "launches": 9, "kernels": [["gemm", 2.0, 1], ["copy", 5.0, 2]]},
    ]
    found = bench.mean_trace(traces)
    assert found == {
        "device_seconds": 3.0,
        "launches": 8,
        "kernels": [["gemm", 3.0, 1.5], ["copy", 2.5, 1.0]],
    }
    assert bench.mean_trace([]) == {}


def test_rounds_hold_what_their_arms_are_compared_with(module):
    bench = module("step_bench")
    titles = bench.wanted(list(bench.ARMS), ["bf16", "fp8"])
    assert len(titles) == len(set(titles)) == 2 * len(bench.ARMS) - 2
    rounds = bench.plan_rounds(titles, 5)
    for arms in rounds:
        assert sum(bench.arm_of(title).places for title in arms) <= 5
    assert {title for arms in rounds for title in arms} == set(titles)
    for title in titles:
        assert any(set(bench.compared_with(title)) <= set(arms) for arms in rounds)
    assert bench.plan_rounds(["bf16-kd", "bf16-host"], 5) == [["bf16-kd", "bf16-host"]]
    few = bench.plan_rounds(["bf16-stock", "bf16-host"], 1)
    assert few == [["bf16-stock"], ["bf16-stock", "bf16-host"]]
    mixed = bench.wanted(["fp8-kd", "stock", "frozen"], ["bf16"])
    assert mixed == ["bf16-stock", "fp8-kd"], "frozen is of FP8, which was not asked for"
    assert bench.plan_rounds(mixed, 3) == [mixed]


def test_curves_are_read_from_a_log(module, tmp_path):
    curves = module("precision_curves")
    line = " iteration {0:8d}/      20 | lm loss: {1:E} | kd loss: {2:E} | grad norm: 0.5 |\n"
    log = line.format(1, 4.5, 2.5) + "noise\n" + line.format(10, 3.5, 1.5)
    (tmp_path / "log").write_text(log + "frozen check: 9 frozen tensors bitwise unchanged\n")
    found = curves.read_log(tmp_path / "log")
    assert found["proved"]
    assert found["curves"]["iteration"] == [1, 10]
    assert found["curves"]["kd loss"] == [2.5, 1.5]
    assert found["curves"]["retention loss"] == [None, None]
