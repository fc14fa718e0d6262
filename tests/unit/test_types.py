"""A wrong argument to a public function is an error of the type checker."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RIGHT = """
import torch
from megatron_moe_inject.losses import vocab_parallel_divergence
from megatron_moe_inject.recipe.load import load_recipe
from megatron_moe_inject.recipe.feature import Feature
from megatron_moe_inject.recipe.features import FEATURES

logits = torch.zeros(1, 8)
loss: torch.Tensor = vocab_parallel_divergence(logits, logits, kind="jsd", temperature=2.0)
weight = load_recipe("recipe.yaml").objective.alpha
FEATURES.register("own", Feature())
"""
WRONG = {
    'kind="jsd"': "kind=3",
    "logits, logits,": 'logits, "logits",',
    'load_recipe("recipe.yaml")': "load_recipe(7)",
    "objective.alpha": "objective.alfa",
    '"own", Feature()': '"own", Feature',
    "import vocab_parallel_divergence": "import vocab_parallel_divergences",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What mypy says of the right lines and, one by one, of the wrong ones."""
    folder = tmp_path_factory.mktemp("types")
    (folder / "right.py").write_text(RIGHT)
    for number, (before, after) in enumerate(WRONG.items()):
        assert before in RIGHT
        (folder / f"wrong{number}.py").write_text(RIGHT.replace(before, after))
    files = sorted(map(str, folder.glob("*.py")))
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def test_right_lines_pass(told):
    assert "right.py" not in told, told


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_a_wrong_one_fails(told, number):
    assert f"wrong{number}.py" in told, told
