"""Deltas of a real injection run: what changed, applied to the base, is the trained student."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_moe_inject.cli import main
from megatron_moe_inject.experts.delta.delta import export_delta
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.gpt_names import stacked_axes
from tests.harness import lane
from tests.harness.checkpoints import SAVE, whole
from tests.harness.evaluating import evaluate
from tests.harness.injection import inject
from tests.harness.material import student_flags
from tests.harness.training_recipes import FEATURES


@pytest.fixture(scope="module")
def trained(material, tmp_path_factory):
    """Experts 3 of layers 2 and 3, on two expert-parallel ranks, with projections beside."""
    folder = tmp_path_factory.mktemp("delta") / "trained"
    recipe = FEATURES.replace("{{1: [1], 3: [0, 3]}}", "{{2: [3], 3: [3]}}")
    inject(material, recipe, nproc=2, ep=2, extra=(*SAVE, str(folder)))
    return folder


@pytest.fixture(scope="module")
def delta(material, trained):
    folder = trained.parent / "delta"
    assert main(_arguments("export-delta", material.student, "--trained", trained, folder)) == 0
    return folder


def _arguments(command, base, flag, second, output):
    return [command, "--base", str(base), flag, str(second), "--output", str(output)]


def test_it_holds_the_chosen_experts_and_nothing_else(delta, capsys):
    described = json.loads((delta / "delta.json").read_text())
    found = {(entry["tensor"], tuple(entry["place"])) for entry in described["slices"].values()}
    experts = "decoder.layers.mlp.experts.experts.linear_fc"
    names = (f"{experts}1.weight", f"{experts}2.weight")
    assert found == {(name, (layer, 3)) for name in names for layer in (2, 3)}
    assert described["bytes"] == 2 * 4 * (128 * 32 + 32 * 64)


def test_applied_to_the_base_it_is_the_trained_student(material, trained, delta, tmp_path, capsys):
    applied = tmp_path / "applied"
    assert main(_arguments("apply-delta", material.student, "--delta", delta, applied)) == 0
    assert "4 slices" in capsys.readouterr().out
    same = CheckpointPlace("--base", applied).open(), CheckpointPlace("--trained", trained).open()
    for name in same[0].tensors:
        assert torch.equal(*(whole(checkpoint, name) for checkpoint in same)), name
    flags = ("--train-iters", "2", *material.blend, "--finetune", "--no-load-optim", "--load")
    runs = [
        lane.run(student_flags(*flags, str(folder), "--no-load-rng", **layout), nproc=nproc)
        for folder, layout, nproc in ((applied, {"ep": 2}, 2), (trained, {}, 1))
    ]
    first, second = (run.losses("lm loss")[0] for run in runs)
    assert first == pytest.approx(second, rel=1e-6)


def test_a_base_in_a_folder_of_any_name_becomes_a_release(material, delta, tmp_path, capsys):
    (stored,) = Path(material.student).glob("iter_*")
    base, applied = tmp_path / "student-v2", tmp_path / "applied"
    shutil.copytree(stored, base)
    assert main(_arguments("apply-delta", base, "--delta", delta, applied)) == 0
    flags = student_flags(*material.blend, "--finetune", "--no-load-optim", "--no-load-rng")
    run = lane.run([*flags, "--train-iters", "1", "--load", str(applied)])
    assert "successfully loaded checkpoint" in run.output


def test_several_files_hold_the_same(material, trained, delta, tmp_path):
    places = CheckpointPlace("--base", Path(material.student)), CheckpointPlace("--t", trained)
    summary = export_delta(*places, tmp_path / "small", file_bytes=20_000)
    described = json.loads((tmp_path / "small" / "delta.json").read_text())
    whole = json.loads((delta / "delta.json").read_text())
    assert len(described["files"]) == 3
    assert summary.bytes == whole["bytes"]
    assert main(
        _arguments("apply-delta", material.student, "--delta", tmp_path / "small", tmp_path / "on")
    ) == 0  # fmt: skip
    # It has no optimizer state and no random numbers, which measuring asks for without a flag.
    measured = evaluate(material, tmp_path / "e.json", load=str(tmp_path / "on"))
    assert measured.provenance.checkpoint_iteration == 3


@pytest.fixture
def broken(delta, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(delta, folder)
    return folder


def _fails(capsys, arguments, *parts):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message
    assert message.count("\n") == 1


def test_mistakes_are_one_line_and_leave_nothing(
    material, trained, delta, broken, tmp_path, capsys
):
    out, student = tmp_path / "out", material.student

    def apply(base, folder):
        return _arguments("apply-delta", base, "--delta", folder, out)

    def export(base, after):
        return _arguments("export-delta", base, "--trained", after, out)

    _fails(capsys, apply(trained, delta), "--base", "other values", "linear_fc1.weight [2, 3]")
    _fails(capsys, apply(material.teacher, delta), "another model than the delta's base")
    _fails(capsys, apply(student, tmp_path), "--delta", "holds no delta.json")
    _fails(capsys, apply("/nowhere", delta), "--base /nowhere is no directory")
    _fails(capsys, export(student, material.teacher), "another model than the base")
    _fails(capsys, export(student, student), "does not differ from the base")
    file = broken / "delta-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    _fails(capsys, apply(student, broken), "is damaged: delta-00001.safetensors")
    (broken / "delta.json").write_text("{}")
    _fails(capsys, apply(student, broken), "cannot be read")
    (broken / "delta.json").write_text('{"format": "other", "version": 3}')
    _fails(capsys, apply(student, broken), "other version 3")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]
    out.mkdir()
    _fails(capsys, apply(student, delta), "is there already")


def test_an_interrupted_export_leaves_nothing(material, trained, tmp_path):
    def stop(items, total):
        yield from list(items)[:3]
        raise KeyboardInterrupt

    places = CheckpointPlace("--base", Path(material.student)), CheckpointPlace("--t", trained)
    with pytest.raises(KeyboardInterrupt):
        export_delta(*places, tmp_path / "delta", progress=stop)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("decoder.layers.mlp.experts.experts.linear_fc1.weight", 2),
        ("decoder.layers.3.mlp.experts.experts.linear_fc1.weight", 1),
        ("decoder.layers.mlp.experts.experts.17.linear_fc1.weight", 1),
        ("decoder.layers.3.mlp.experts.experts.17.linear_fc1.weight", 0),
        ("decoder.layers.mlp.shared_experts.linear_fc1.weight", 1),
        ("decoder.final_layernorm.weight", 0),
        ("embedding.word_embeddings.weight", 0),
    ],
)
def test_stacked_axes(name, axes):
    assert stacked_axes(name) == axes
