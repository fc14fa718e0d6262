"""Tiny folders with adapters on everything that a recipe can put them on, as checkpoints."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_moe_inject.cli import main
from megatron_moe_inject.host.gpt_names import stacked_axes
from tests.harness.stored_adapters import Site, entry, opened, write_adapters

ENTRIES = [entry(2, 8.0), entry(4, 4.0, "rslora"), entry(3, 3.0)]
"""Of experts, of the first expert of each layer besides, of everything else."""
_MATRICES = re.compile(
    r"decoder\.layers\.(\d+\.)?(self_attention\.linear_\w+|mlp\.(\w+\.)*linear_fc[12]|mlp\.router)"
    r"\.weight|output_layer\.weight"
)


def sites_of(base: Path, pattern: str = "") -> dict[Site, list[int]]:
    """Every matrix whose name matches, but for the last expert of each layer, with the numbers of
    its entries."""
    sites: dict[Site, list[int]] = {}
    for name, stored in opened(base).tensors.items():
        if not _MATRICES.fullmatch(name) or not re.search(pattern, name):
            continue
        sizes = stored.size[: stacked_axes(name)]
        for place in itertools.product(*map(range, sizes)):
            if ".experts.experts." not in name:
                sites[name, place] = [2]
            elif place[-1] < sizes[-1] - 1:
                sites[name, place] = [0] if place[-1] else [0, 1]
    return sites


def write_adapted(
    hf: Path, root: Path, pattern: str = "", layout: str = "gpt", **more: Any
) -> Path:
    """The import of a folder with adapters; ``root`` has it as ``base`` and ``adapted``."""
    words = () if layout == "gpt" else ("--layout", layout)
    assert main(["import-hf", str(hf), "--output", str(root / "base"), *words]) == 0
    sites = sites_of(root / "base", pattern)
    write_adapters(root / "base", root / "adapted", sites, ENTRIES, **more)
    return root / "adapted"


def python_with(package: str) -> str:
    """The Python that has a package: ``PEFT_PYTHON``, say, or this one; skipped without."""
    variable = f"{package.upper()}_PYTHON"
    if variable in os.environ:
        return os.environ[variable]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed; {variable} names a Python that has it")
    return sys.executable


def asked(python: str, script: str, cases: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The answers of a script of this folder to its cases."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, str(Path(__file__).with_name(script))], input=json.dumps(cases), text=True,
        env=environment, capture_output=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
