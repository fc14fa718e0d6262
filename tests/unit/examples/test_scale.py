"""The benchmark of messages: a pretended world, and bytes as a rank sends and holds them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.harness.docs import ROOT

SCRIPT = ROOT / "examples" / "benchmarks" / "scale.py"


def test_a_pretended_world_is_timed():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--simulate", "2", "8"],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    head, rule, *rows = done.stdout.splitlines()
    assert head == "| seconds on one rank | 2 ranks | 8 ranks |"
    assert rule.count("---") == 3
    assert len(rows) == 5
    assert all(
        float(cell) >= 0 for row in rows for cell in row.split(" | ")[1:3] if "|" not in cell
    )


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("all_reduce", [torch.zeros(3)], (12, 12)),
        ("all_gather", [[torch.zeros(2)] * 4, torch.zeros(2)], (8, 32)),
        ("all_gather_into_tensor", [torch.zeros(8), torch.zeros(2)], (8, 32)),
        ("barrier", [None], (0, 0)),
    ],
)
def test_bytes_of_a_call(name, arguments, expected):
    import importlib.util

    spec = importlib.util.spec_from_file_location("scale", Path(SCRIPT))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module._bytes(name, arguments) == expected
