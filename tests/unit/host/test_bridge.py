"""Bridge's training loops end in one line, in whichever order a script imports; the rest works.

The package stands in for Bridge with the names that 0.6.2 has; ``tests/bridge`` runs the real one.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe_inject.host import bridge
from megatron_moe_inject.host.bridge import DOORS, MESSAGE

ROOT = Path(__file__).resolve().parents[3]
_LOOP = """
from megatron.bridge.training.{module} import {first}
def {name}():
    {first}(None)
    print("trained")
"""
MODULES = {
    "config": "def runtime_config_update(cfg): pass\n"
    "def megatron_mimo_runtime_config_update(cfg): pass\n",
    "initialize": "def initialize_megatron(cfg): pass\n",
    "setup": _LOOP.format(module="initialize", first="initialize_megatron", name="setup"),
    "pretrain": _LOOP.format(module="config", first="runtime_config_update", name="pretrain"),
    "pretrain_megatron_mimo": _LOOP.format(
        module="config", first="megatron_mimo_runtime_config_update", name="pretrain_megatron_mimo"
    ),
}
TRAINING = [name.rpartition(".")[2] for name in DOORS]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder with a Bridge in it, on the path."""
    training = tmp_path / "megatron" / "bridge" / "training"
    training.mkdir(parents=True)
    for folder in (training, training.parent):
        (folder / "__init__.py").touch()
    for name, source in MODULES.items():
        (training / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("megatron.bridge")]:
        del sys.modules[name]


def loop(name):
    """A training loop, as a script keeps it that imports it by name."""
    return getattr(importlib.import_module(f"megatron.bridge.training.{name}"), name)


@pytest.mark.parametrize("installed_first", [True, False])
@pytest.mark.parametrize("name", TRAINING)
def test_training_with_bridge_ends_in_one_line(site, capsys, name, installed_first):
    if installed_first:
        bridge.refuse_training()
    train = loop(name)
    bridge.refuse_training()
    with pytest.raises(SystemExit) as end:
        train()
    said = capsys.readouterr()
    assert end.value.code == 2
    assert said.err.strip() == f"megatron_moe_inject: error: {MESSAGE}"
    assert said.out == ""


@pytest.mark.parametrize("name", TRAINING)
def test_without_the_plugin_bridge_is_as_it_was(site, capsys, name):
    loop(name)()
    assert capsys.readouterr().out == "trained\n"


def test_what_only_converts_is_left_alone(site):
    bridge.refuse_training()
    loop("pretrain")
    config = importlib.import_module("megatron.bridge.training.config")
    assert config.runtime_config_update(None) is None


@pytest.mark.parametrize("name", TRAINING)
def test_a_bridge_with_other_names_is_not_passed_over(site, name):
    (site / "megatron" / "bridge" / "training" / f"{name}.py").write_text("")
    bridge.refuse_training()
    with pytest.raises(ImportError, match=f"megatron.bridge.training.{name} has no "):
        loop(name)


def test_the_launcher_says_it_once_for_all_ranks(site):
    script = site / "script.py"
    script.write_text("from megatron.bridge.training.pretrain import pretrain\npretrain()\n")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    launch += ["-m", "megatron_moe_inject.launch", "--cpu"]
    done = subprocess.run(
        [sys.executable, *launch, str(script), "--inject-recipe", "recipe.yaml"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{site}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    line = f"megatron_moe_inject: error: {MESSAGE}"
    assert done.stderr.splitlines().count(line) == 1  # beside torchrun's block, indented
    assert "trained" not in done.stdout
