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

import as_mixtral  # noqa: E402
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
    made = directions.recipe(direction, by, "/data", study.source, steps=100)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(made))
    recipe = load_recipe(path)
    assert recipe.train.everything
    (domain,) = recipe.domains
    assert domain.data[0] == f"/data/{direction.text}_train"
    assert bool(domain.teacher) is (by != directions.CE)
    weights = made["objective"]
    if by == directions.FALLING:
        alpha, beta = (weights[key]["points"] for key in ("alpha", "beta"))
        assert [alpha[at] + beta[at] for at in (0, 100)] == [1, 1]
        assert beta[0] > 0.5 > beta[100] > 0
    else:
        assert (weights["alpha"], weights["beta"]) == ((1, 0) if by == directions.KD else (0, 1))
    assert start in direction.rates


def value(flags, name):
    return int(flags[flags.index(name) + 1])


def test_starts_are_those_of_the_quickstart_s_models(tmp_path):
    study = compare.Study("moe_to_dense", tmp_path)
    dense, folder = study.model(directions.DENSIFIED)
    teacher = runner.flags("STUDENT")
    for name in ("--num-layers", "--hidden-size", "--num-attention-heads"):
        assert value(dense, name) == value(teacher, name)
    experts = value(dense, "--ffn-hidden-size") / value(teacher, "--moe-ffn-hidden-size")
    assert 0 < experts < value(teacher, "--num-experts")
    assert folder == tmp_path / "densified"
    assert study.model(directions.SCRATCH) == (dense, None)

    study = compare.Study("dense_to_moe", tmp_path)
    dense = runner.flags("TEACHER")
    assert study.model(directions.ITSELF) == (dense, tmp_path / "teacher")
    experts, folder = study.model(directions.UPCYCLED)
    assert folder == tmp_path / "upcycled"
    copies = directions.EXPERTS // directions.GRANULARITY
    width = value(experts, "--num-experts") * value(experts, "--moe-ffn-hidden-size")
    assert width == copies * value(dense, "--ffn-hidden-size")
    assert directions.TOPK % directions.GRANULARITY == 0


def test_the_folder_that_the_export_is_like_has_the_teacher_s_sizes(tmp_path):
    pytest.importorskip("transformers")
    as_mixtral.write(tmp_path / "template")
    config = json.loads((tmp_path / "template" / "config.json").read_text())
    flags = runner.flags("STUDENT")
    for key, name in (
        ("num_hidden_layers", "--num-layers"),
        ("hidden_size", "--hidden-size"),
        ("num_attention_heads", "--num-attention-heads"),
        ("num_local_experts", "--num-experts"),
        ("num_experts_per_tok", "--moe-router-topk"),
        ("intermediate_size", "--moe-ffn-hidden-size"),
    ):
        assert config[key] == value(flags, name), key
    tokenizer = json.loads((as_mixtral.TOKENIZER / "tokenizer.json").read_text())
    assert config["vocab_size"] == len(tokenizer["model"]["vocab"])


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
