"""Dense students of experts, and the other way round: recipes, starts, table and picture."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

from megatron_moe_inject.cli import main
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.recipe.load import load_recipe
from tests.harness.checkpoints import whole
from tests.harness.stored_moe import HIDDEN, write_moe

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "examples" / "moe_to_dense"))

import compare  # noqa: E402
import directions  # noqa: E402
import drawn  # noqa: E402
import runner  # noqa: E402

ARMS = [
    pytest.param(name, start, by, id=f"{start}, {by}")
    for name, direction in directions.DIRECTIONS.items()
    for start, by in direction.arms
]


@pytest.mark.parametrize(("name", "start", "by"), ARMS)
def test_every_arm_is_a_valid_recipe_that_trains_everything(tmp_path, name, start, by):
    direction = directions.DIRECTIONS[name]
    study = compare.Study(name, tmp_path)
    made = directions.recipe(direction, by, "/data", study.source, 100, processes=2)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(made))
    recipe = load_recipe(path)
    assert recipe.train.everything
    (domain,) = recipe.domains
    assert domain.data[0] == f"/data/{direction.text}_train"
    assert bool(domain.teacher) is (by != directions.CE)
    if domain.teacher:
        assert recipe.teachers["teacher"].ep == (2 if direction.experts else 1)
    weights = made["objective"]
    if by == directions.FALLING:
        alpha, beta = (weights[key]["points"] for key in ("alpha", "beta"))
        assert [alpha[at] + beta[at] for at in (0, 100)] == [1, 1]
        assert beta[0] > 0.5 > beta[100] > 0
    elif by == directions.BESIDE:
        assert (weights["alpha"], weights["beta"]["points"]) == (1, {0: 0.8, 100: 0})
    else:
        assert (weights["alpha"], weights["beta"]) == ((1, 0) if by == directions.KD else (0, 1))


def value(flags, name):
    return int(flags[flags.index(name) + 1])


@pytest.fixture
def commands(monkeypatch):
    """What would be run, by the name of its log; a command's checkpoint is taken as written."""
    found = {}

    def logged(log, *words):
        found[log.name] = words
        if "--output" in words:
            Path(words[words.index("--output") + 1]).mkdir()

    monkeypatch.setattr(runner, "logged", logged)
    return found


def test_dense_students_begin_as_the_teacher_in_half_the_width(tmp_path, commands):
    study = compare.Study("moe_to_dense", tmp_path)
    dense, folder = study.model(directions.DENSIFIED)
    teacher = runner.flags("STUDENT")
    for name in ("--num-layers", "--hidden-size", "--num-attention-heads"):
        assert value(dense, name) == value(teacher, name)
    experts = value(dense, "--ffn-hidden-size") / value(teacher, "--moe-ffn-hidden-size")
    assert 0 < experts < value(teacher, "--num-experts")
    assert folder == tmp_path / "densified"
    words = commands["densified.log"]
    assert words[words.index("densify") + 1] == str(tmp_path / "student")
    assert value(words, "--ffn-hidden-size") == value(dense, "--ffn-hidden-size")
    assert study.model(directions.SCRATCH) == (dense, None)
    assert study.model(directions.DRAWN) == (dense, tmp_path / "drawn")


def test_a_mixture_begins_as_the_weaker_dense_model_and_uses_as_much(tmp_path, commands):
    study = compare.Study("dense_to_moe", tmp_path)
    small, folder = study.model(directions.SMALL_ON)
    assert folder == tmp_path / "small"
    assert value(small, "--hidden-size") < value(runner.flags("TEACHER"), "--hidden-size")
    experts, folder = study.model(directions.UPCYCLED)
    assert folder == tmp_path / "upcycled"
    assert experts[: len(small)] == small
    width, neurons = value(experts, "--moe-ffn-hidden-size"), value(small, "--ffn-hidden-size")
    assert width * directions.GRANULARITY == neurons
    assert width * value(experts, "--moe-router-topk") == neurons, "a token passes one copy"
    words = commands["upcycled.log"]
    assert words[words.index("upcycle") + 1] == str(tmp_path / "small")
    asked = [value(words, name) for name in ("--experts", "--topk", "--granularity")]
    assert asked == [directions.EXPERTS, directions.TOPK, directions.GRANULARITY]


def test_each_of_densify_s_options_is_a_start_of_its_own(tmp_path, commands):
    study = compare.Study("densify", tmp_path)
    folders = {study.model(start)[1] for start in directions.DENSIFY}
    assert len(folders) == len(directions.DENSIFY) == len(commands)
    base = write_moe(tmp_path / "moe", hidden_size=HIDDEN, params_dtype=torch.float32, swiglu=True)
    for number, options in enumerate(directions.DENSIFY.values()):
        output = str(tmp_path / f"dense-{number}")
        words = ["densify", str(base), "--output", output, "--ffn-hidden-size", "20", *options]
        assert main(words) == 0, options


def test_drawn_feed_forwards_leave_all_else(tmp_path):
    base = write_moe(tmp_path / "moe", hidden_size=HIDDEN, params_dtype=torch.float32, swiglu=True)
    words = ["densify", str(base), "--output", str(tmp_path / "dense")]
    assert main([*words, "--ffn-hidden-size", "40"]) != 0, "wider than all experts"
    assert main([*words, "--ffn-hidden-size", "20"]) == 0
    drawn.write(tmp_path / "dense", tmp_path / "drawn")
    before, after = (CheckpointPlace("CKPT", tmp_path / name).open() for name in ("dense", "drawn"))
    for name in before.tensors:
        same = torch.equal(whole(before, name), whole(after, name))
        assert same is not name.startswith("decoder.layers.mlp.linear_fc"), name
    assert float(whole(after, drawn.FIRST).std()) == pytest.approx(0.02, rel=0.1)
    assert float(whole(after, drawn.SECOND).std()) == pytest.approx(0.02 / 6**0.5, rel=0.1)


def run(start, by, seed, *bits):
    steps = [0, 25, 100] if len(bits) == 3 else [25, 100]
    found = [[step, value] for step, value in zip(steps, bits, strict=True)]
    return {"start": start, "by": by, "seed": seed, "steps": 100, "bits": found}


RUNS = [
    run("from scratch", "CE", 1, 3.0, 2.5),
    run("from scratch", "CE", 2, 3.2, 2.7),
    run("densify", "KD", 1, 2.8, 2.2, 1.9),
]


def test_the_table_has_a_mean_and_a_spread_by_arm():
    assert compare.table("moe_to_dense", RUNS, 1.725).splitlines()[2:] == [
        "| from scratch | CE | - | 3.100 ± 0.100 | 2.600 ± 0.100 | 2 |",
        "| densify | KD | 2.800 | 2.200 | 1.900 | 1 |",
        "| the teacher | | 1.725 | | | |",
    ]


def test_a_report_is_written_from_finished_runs_alone(tmp_path, monkeypatch, capsys):
    lines = "".join(json.dumps(line) + "\n" for line in RUNS)
    (tmp_path / "moe_to_dense.jsonl").write_text(lines + '{"start": "dens')
    (tmp_path / "moe_to_dense-teacher.json").write_text('{"bits_per_byte": 1.7}')
    words = shlex.split(f"compare.py --report --results {tmp_path}")
    monkeypatch.setattr(sys, "argv", words)
    compare.main()
    assert "| densify | KD | 2.800 | 2.200 | 1.900 | 1 |" in capsys.readouterr().out
    assert (tmp_path / "moe_to_dense.md").read_text().endswith("| the teacher | | 1.700 | | | |\n")
    assert (tmp_path / "moe_to_dense.png").stat().st_size > 10_000


def test_seeds_that_are_not_there_are_refused(capsys):
    with pytest.raises(SystemExit):
        compare.parse(["--seeds", "4"])
    assert "--seeds: 4 is none of 1 to 3" in capsys.readouterr().err
