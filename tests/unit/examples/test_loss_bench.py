"""The loss benchmark as a user runs it, tiny: its table, its figures, peers that are missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CONTENDERS = ("naive", "ours", "ours-torch", "ours-logits", "ours-topk", "modelopt",
              "liger-chunked", "liger-jsd")  # fmt: skip
MEASURED = ("naive", "ours", "ours-logits", "ours-topk")


@pytest.fixture(scope="module", params=[1, 2])
def bench(request, tmp_path_factory):
    """(tp, printed text, figures) of a run on an environment without the peers."""
    tp, folder = request.param, tmp_path_factory.mktemp("bench")
    for name in ("modelopt", "liger_kernel"):  # even where they are installed
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name}')")
    flags = "--device cpu --tokens 48 --vocab 512 --hidden 32 --teacher-hidden 16 --topk 16"
    flags += f" --repeats 2 --sweep-repeats 1 --tp {tp} --json {folder}/figures.json"
    flags += f" --plot {folder}/figure.png" if tp == 1 else ""
    flags += f" --contenders {' '.join(CONTENDERS)}"
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "benchmarks" / "loss_bench.py", *flags.split()],
        env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "figure.png").exists() == (tp == 1)
    return tp, done.stdout, json.loads((folder / "figures.json").read_text())


def test_every_contender_has_a_row_for_each_head(bench):
    tp, _, figures = bench
    rows = [(row["contender"], row["tp"], row["head"]) for row in figures["rows"]]
    assert rows == [(name, tp, head) for head in ("frozen", "trained") for name in CONTENDERS]


def test_ours_and_naive_are_right_and_measured(bench):
    tp, _, figures = bench
    rows = [row for row in figures["rows"] if row["contender"] in MEASURED]
    assert {row["status"] for row in rows} == {"measured"}
    for row in rows:
        errors = [row[f"{name}error"] for name in ("value_", "gradient_", "head_gradient_")]
        assert max(errors) < 2e-6, row
        assert row["seconds"] > 0
        teacher = 0 if row["contender"] == "ours-topk" else 16
        products = teacher + (96 if row["head"] == "trained" else 64)
        flops = row["flops_per_second"] * row["seconds"]
        assert flops == pytest.approx(2 * 48 * 512 * products)
        own_head = 512 // tp * 32 if row["head"] == "trained" else 0
        assert row["gradient_bytes"] == 4 * (48 * 32 + own_head)


def test_a_missing_peer_is_listed_with_its_remedy(bench):
    tp, printed, figures = bench
    status = {row["contender"]: row["status"] for row in figures["rows"]}
    assert status["modelopt"].startswith("not installed (pip install nvidia-modelopt)")
    assert "not installed (pip install nvidia-modelopt)" in printed
    if tp == 1:
        assert status["liger-chunked"].startswith("not installed (pip install liger-kernel)")
        assert status["liger-jsd"] == "needs a GPU"
    else:
        assert status["liger-chunked"] == status["liger-jsd"] == "no tensor parallelism"


def test_shares_of_the_limit(bench):
    """Without a data sheet the limit is the product that was measured on the same device."""
    tp, printed, figures = bench
    rows = [row for row in figures["rows"] if "seconds" in row]
    for row in rows:
        rate = figures["product"][str(tp)]
        column = f"{row['flops_per_second'] / 1e9:,.1f}{row['flops_per_second'] / tp / rate:>7.2f}"
        assert column in printed
    status = {row["contender"]: row["status"] for row in figures["rows"]}
    assert status["ours-torch"] == "needs a GPU"


def test_aims_are_judged_from_the_rows(bench):
    tp, printed, figures = bench
    row = {(r["contender"], r["head"]): r for r in figures["rows"]}
    seconds = row["ours", "frozen"]["seconds"] / row["naive", "frozen"]["seconds"]
    aims = {aim["aim"]: aim for aim in figures["aims"]}
    time = aims[f"TP {tp}, head frozen: time / naive's"]
    assert time["got"] == pytest.approx(seconds)
    assert time["met"] == (seconds <= 1)
    share = aims[f"TP {tp}, head frozen: share of the GPU's peak product rate"]
    assert share["met"] is None
    assert "not measured" in printed


def test_the_sweep_varies_one_size_at_a_time(bench):
    tp, _, figures = bench
    points = [p for p in figures["sweep"] if p["contender"] == "ours"]
    sizes = [(p["axis"], p["tokens"], p["vocab"]) for p in points]
    tokens = [("tokens", t, 128) for t in (6, 12, 24, 48)]
    vocab = [("vocab", 12, v) for v in (64, 128, 256, 512)]
    assert sizes == (tokens + vocab if tp == 1 else [])


def test_a_size_that_does_not_shard_is_refused():
    script = ROOT / "examples" / "benchmarks" / "loss_bench.py"
    done = subprocess.run(
        [sys.executable, script, "--vocab", "1001"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "--vocab 1001 must be divisible by 4 x --tp 2" in done.stderr
