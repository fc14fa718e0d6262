"""The freezing benchmark: it measures what it says, and survives arms that crash or hang."""

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Imports a module of the benchmarks by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.parametrize(
    "arms",
    [
        ("all", "last-quarter"),
        pytest.param(("all", "every-layer", "stock-every-layer"), marks=pytest.mark.slow),
    ],
    ids=["last quarter", "every layer, stock"],
)
def test_bytes_follow_the_chosen_experts(tmp_path, arms):
    """A tiny run of the command, stock flags included."""
    small = "--layers 4 --hidden 32 --ffn 32 --experts 4 --chosen 1 --seq 16 --vocab 64"
    few = "--micro-batch 1 --global-batch 2 --steps 1 --warm-up 1 --layouts single"
    command = [sys.executable, str(FOLDER / "freeze_bench.py"), *small.split(), *few.split()]
    done = subprocess.run(
        [*command, "--arms", *arms, "--json", str(tmp_path / "out.json")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["arm"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    of_expert = 3 * 32 * 32
    for arm in arms[1:]:
        row = rows[arm]
        assert row["trained"] == (1 if arm == "last-quarter" else 4) * of_expert
        assert row["gradient_bytes"] == pytest.approx(4 * row["trained"], rel=0.1)
        assert row["optimizer_bytes"] == pytest.approx(8 * row["trained"], rel=0.1)
        assert row["seconds"][0] > 0
        assert row["cpu_seconds"][0] > 0
    assert rows["all"]["trained"] > 16 * of_expert
    assert ("plugin, chosen, last quarter" in done.stdout) == ("last-quarter" in arms)


def test_limits_are_those_of_the_arithmetic(module):
    """One layer in four, and nothing but experts of which nearly none are chosen."""
    sizes = dict(layers=4, hidden=1, ffn=10**9, topk=2, experts=1000, chosen=1, seq=1, vocab=1)
    found = module("freeze_report").limits(sizes)
    assert found["every-layer"] == pytest.approx((4 + 3) / 12, rel=2e-3)
    assert found["last-quarter"] == pytest.approx(4 / 12, rel=2e-3)


@pytest.mark.parametrize(
    ("body", "ended"),
    [
        ("line.readline(); raise ValueError('no such thing')", "crashes in step 1: ValueError: no"),
        ("import time; line.readline(); time.sleep(60)", "hangs in step 1 (no answer for 2 s)"),
        ("raise SystemExit('enough')", "crashes in step 1: enough"),
    ],
)
def test_arms_that_end_early_say_how(module, tmp_path, body, ended):
    turns = module("turns")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        connect = f"import socket; line = socket.create_connection(('127.0.0.1', {port}))"
        program = f"{connect}.makefile('rw')\n{body}"
        log = tmp_path / "log"
        with log.open("wb") as out:
            process = subprocess.Popen([sys.executable, "-c", program], stdout=out, stderr=out)
        arm = turns.Running([process], [log])
        arm.lines[0] = turns.Line(listener.accept()[0])
        arm.turn(2)
    assert arm.ended.startswith(ended)
    assert process.poll() is not None
