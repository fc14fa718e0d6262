"""The scripts of ``examples/models``: alike, right at full size, one line for a mistake."""

import datetime
import json
import re
import shutil

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_moe_inject.cli import main
from tests.harness import tiny_models
from tests.harness.cards import CHECKS, Card, parameters
from tests.harness.corpus import write_prepared
from tests.harness.full_models import full_scripts
from tests.harness.model_scripts import MODELS, NAMES, ModelScripts

FILES = {
    *("card.yaml", "convert.sh", "export.sh", "inject.sh", "model.sh", "plan.sh", "prepare.sh"),
    *("profile.sh", "recipe.yaml"),
}
SRUN = """#!/usr/bin/env bash
while [ "$1" != "$PYTHON" ]; do shift; done
exec "$@"
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    write_prepared(folder)
    tiny_models.make_teacher(folder / "hf", folder / "domain")
    return folder / "hf"


@pytest.fixture(params=NAMES)
def full(request, tmp_path, teacher):
    return full_scripts(request.param, tmp_path, teacher)


def told(name, variable):
    return re.search(
        rf"{variable}=(?:\${{NODES:-)?([^\s}}]+)", (MODELS / name / "model.sh").read_text()
    )[1]


class TestFolder:
    @pytest.mark.parametrize("name", NAMES)
    def test_every_model_has_the_same_files(self, name):
        assert {path.name for path in (MODELS / name).iterdir()} == FILES
        assert told(name, "NAME") == name

    @pytest.mark.parametrize("name", NAMES)
    def test_a_card_claims_what_the_tests_measure_and_nothing_else(self, name):
        card = Card.read(name)
        assert card.run_here.keys() == CHECKS.keys()
        assert card.run_here["parameters"] == parameters(name)
        assert card.hub == told(name, "HUB")
        assert card.architecture == tiny_models.published(name)["model_type"]
        assert card.tiny.keys() <= tiny_models.published(name).keys()
        assert card.command.endswith(f"-k {name}")
        assert isinstance(card.date, datetime.date)
        assert card.versions.keys() == {"python", "torch", "megatron-core", "transformers"}
        assert card.not_run

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("script", ["inject.sh", "profile.sh"])
    def test_slurm_is_asked_for_the_nodes_that_the_layout_is_made_for(self, name, script):
        (nodes,) = re.findall(r"#SBATCH --nodes=(\d+) ", (MODELS / name / script).read_text())
        assert nodes == told(name, "NODES")


class TestFullSize:
    def test_the_flags_are_megatrons_and_the_recipe_fits_the_model(self, full, capsys):
        (command,) = full.commands("plan.sh")
        assert command.words[0] == "plan"
        words = list(command.words)
        del words[words.index("--gpus") : words.index("--")]
        assert main(words) == 0
        text = capsys.readouterr().out
        experts, layers, of, all_layers = map(
            int, re.search(r"(\d+) experts in (\d+) layers \(of (\d+) in (\d+)\)", text).groups()
        )
        assert layers == all_layers
        assert experts == layers * int(told(full.name, "CHOSEN"))
        assert of == layers * int(told(full.name, "EXPERTS"))
        assert "ignored" not in text

    def test_the_recipe_asks_for_as_many_experts_of_a_profile(self, full):
        recipe = (MODELS / full.name / "recipe.yaml").read_text()
        (number,) = re.findall(r"method: top_n, n: (\d+), score: contrast, ep: \1}", recipe)
        assert number == told(full.name, "CHOSEN")

    @pytest.mark.slow
    def test_it_fits_on_the_nodes_that_the_script_names(self, full, capsys):
        (command,) = full.commands("plan.sh")
        assert main(list(command.words)) == 0
        assert re.search(r"all \d+ ranks fit", capsys.readouterr().out)

    def test_a_run_on_a_cluster_meets_at_the_first_node(self, full):
        tools = full.folder / "bin"
        tools.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\nprintf 'n7\\nn8\\n'\n")):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        (full.folder / full.name / "profile.json").write_text("{}")
        job = {"SLURM_JOB_ID": "5", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[7-8]"}
        path = f"{tools}:/usr/bin:/bin"
        (command,) = full.commands("inject.sh", "--seed", "7", PATH=path, **job)
        assert command.module == "megatron_moe_inject.pretrain"
        assert command.words[-2:] == ("--seed", "7")
        launcher = (full.folder / "recorded").read_text().split("\0")
        assert launcher[launcher.index("--rdzv-endpoint") + 1] == "n7:29500"
        assert launcher[launcher.index("--nnodes") + 1] == "2"
        assert launcher[launcher.index("--nproc-per-node") + 1] == "8"


def test_text_in_json_lines_becomes_what_the_other_steps_read(tmp_path, capsys):
    text, files = tmp_path / "text", {}
    text.mkdir()
    for number, name in enumerate(("DOMAIN", "GENERAL")):
        path = tmp_path / f"{name}.jsonl"
        lines = [json.dumps({"text": f"{name} {number} {i} " * 9}) for i in range(40)]
        path.write_text("\n".join(lines))
        files[name] = str(path)
    hf = shutil.copytree(tiny_models.TOKENIZER, tmp_path / "hf")
    scripts = ModelScripts("qwen3_30b_a3b", tmp_path, HF=str(hf), TEXT=str(text))
    commands = scripts.commands("prepare.sh", "--workers", "1", "--held-out", "0.2", **files)
    for command in commands:
        assert main(list(command.words)) == 0
    for kind in ("domain", "general"):
        parts = [IndexedDataset(str(text / f"{kind}{end}")) for end in ("", "_held_out")]
        assert sum(map(len, parts)) == 40
        assert min(map(len, parts)) > 0
    assert "each document ends with <|endoftext|>" in capsys.readouterr().out


def test_a_script_is_its_own_models_wherever_it_is_called(tmp_path):
    scripts = ModelScripts("olmoe", tmp_path, HF=str(tmp_path))
    (command,) = scripts.commands("convert.sh", folder=MODELS / "deepseek_v3")
    assert str(tmp_path / "olmoe" / "student") in command.words


class TestMistakes:
    """A step that was left out is one line, and nothing is started."""

    def assert_fails(self, scripts, script, *fragments, **environment):
        run, commands = scripts.run(script, **environment)
        assert (run.returncode, commands) == (2, [])
        (line,) = run.stderr.splitlines()
        assert line.startswith("olmoe: ")
        for fragment in fragments:
            assert fragment in line

    def test_nothing_was_downloaded(self, tmp_path):
        scripts = ModelScripts("olmoe", tmp_path)
        remedy = "hf download allenai/OLMoE-1B-7B-0924"
        self.assert_fails(scripts, "convert.sh", str(tmp_path / "hf/olmoe"), remedy)
        self.assert_fails(scripts, "prepare.sh", remedy)

    def test_text_is_not_named_or_not_there(self, tmp_path):
        scripts = ModelScripts("olmoe", tmp_path, HF=str(tmp_path))
        self.assert_fails(scripts, "prepare.sh", "DOMAIN=")
        self.assert_fails(scripts, "prepare.sh", "/no.jsonl", DOMAIN="/no.jsonl")

    def test_a_step_was_left_out(self, tmp_path, teacher):
        scripts = full_scripts("olmoe", tmp_path, teacher)
        self.assert_fails(scripts, "inject.sh", "profile.sh")
        self.assert_fails(scripts, "inject.sh", "TEACHER=", TEACHER=str(tmp_path / "none"))
        self.assert_fails(scripts, "export.sh", "run inject.sh")
        self.assert_fails(scripts, "profile.sh", "run prepare.sh", TEXT=str(tmp_path / "none"))
        shutil.rmtree(tmp_path / "olmoe")
        self.assert_fails(scripts, "profile.sh", "run convert.sh")
        self.assert_fails(scripts, "plan.sh", "run convert.sh")
