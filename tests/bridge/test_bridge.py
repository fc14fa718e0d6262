"""The real Megatron-Bridge, in its own environment: what it does without the plugin and with it.

Its conversion is a second opinion: the checkpoint that ``moe-inject import-hf`` writes of a folder
holds the tensors that Bridge makes of it, name by name and bit by bit.
"""

import json
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megatron_moe_inject.host.bridge import MESSAGE
from tests.harness.checkpoints import whole
from tests.harness.served_folders import save_tiny

JOB = Path(__file__).resolve().parents[1] / "harness" / "bridge_job.py"
KNOWN_TO_BRIDGE = ("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3", "llama")
"""Of what we convert. Bridge 0.6.2 has no Mixtral and no Qwen2-MoE, and refuses OLMoE in these
sizes (one norm for all heads)."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    for model_type in KNOWN_TO_BRIDGE:
        save_tiny(model_type, root / model_type)
    return root


def bridge(*words):
    """Run Bridge's Python, which ``run.sh`` makes."""
    if "BRIDGE_PYTHON" not in os.environ:
        pytest.skip("bash tests/bridge/run.sh makes the environment that has Megatron-Bridge")
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    return subprocess.run(
        [os.environ["BRIDGE_PYTHON"], str(JOB), *map(str, words)],
        env=os.environ | place, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def test_bridge_trains_alone(folders):
    done = bridge("train", folders / "qwen3_moe")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "iteration        3/       3" in done.stdout + done.stderr


def test_beside_the_plugin_it_does_not_train_and_says_why(folders):
    done = bridge("train", folders / "qwen3_moe", "--inject-recipe", "no-such-recipe.yaml")
    assert done.returncode == 2
    assert done.stderr.strip().endswith(f"megatron_moe_inject: error: {MESSAGE}")
    assert "iteration        1/" not in done.stdout + done.stderr


@pytest.mark.parametrize("model_type", KNOWN_TO_BRIDGE)
def test_import_hf_writes_what_bridge_makes_of_a_folder(folders, tmp_path, model_type):
    done = bridge("convert", folders / model_type, tmp_path / "bridge")
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert (answer["missing"], answer["other"]) == ([], [])
    theirs = opened(tmp_path / "bridge")
    assert theirs.tensors
    if find_spec("megatron_moe_inject.convert") is None:
        pytest.skip("this version of the plugin has no import-hf")
    from megatron_moe_inject.cli import main

    ours = tmp_path / "ours"
    command = ["import-hf", str(folders / model_type), "--output", str(ours)]
    assert main([*command, "--dtype", "fp32", "--vocab-multiple", "128"]) == 0
    compare(opened(ours), theirs)


def opened(folder):
    from megatron_moe_inject.host.torch_dist import TorchDistCheckpoint

    class Source:
        path = folder

        def error(self, problem, remedy):
            return AssertionError(f"{folder} {problem}; {remedy}")

    return TorchDistCheckpoint.open(Source())


def compare(ours, theirs):
    """Every tensor of Bridge's is in ours; ours may hold a norm under its second name too."""
    assert not theirs.tensors.keys() - ours.tensors.keys()
    for name in theirs.tensors:
        assert torch.equal(whole(ours, name), whole(theirs, name)), name
