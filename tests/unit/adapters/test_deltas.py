"""Deltas of adapters: factors and rows as they are, merged onto the base that they began from."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_moe_inject.cli import main
from megatron_moe_inject.host.torch_dist_copy import replaced, saved_copy
from tests.harness.checkpoints import whole
from tests.harness.stored_adapters import entry, opened, write_adapters
from tests.harness.tiny_folders import save_folder

FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
FC2 = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
QKV = "decoder.layers.self_attention.linear_qkv.weight"
NORM = "decoder.final_layernorm.weight"
EMBEDDING = "embedding.word_embeddings.weight"
ENTRIES = [entry(2, 8.0), entry(4, 4.0, "rslora")]
SITES = {(FC1, (0, 1)): [0, 1], (FC2, (1, 3)): [0], (QKV, (1,)): [1]}
IDS = [7, 2, 44]
EXPERT = (1, 0)
"""Layer and number of one without adapters, whose matrix trained whole."""


def command(name, **paths):
    words = [word for key, value in paths.items() for word in (f"--{key}", str(value))]
    return main([name, *words])


def changed(checkpoint, output, name, place=()):
    """A copy of a checkpoint with one slice changed."""
    output.mkdir()
    before = opened(checkpoint)
    new = whole(before, name)[place] + 1
    saved_copy(before, output, {name: replaced({place: lambda: new})}, lambda items, total: items)
    return output


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder, its import, that with adapters and with an expert and a norm that trained whole,
    and the delta of both."""
    root = tmp_path_factory.mktemp("deltas")
    save_folder("qwen3_moe", root / "hf")
    assert main(["import-hf", str(root / "hf"), "--output", str(root / "base")]) == 0
    write_adapters(root / "base", root / "adapted", SITES, ENTRIES, ids=IDS)
    changed(root / "adapted", root / "half", FC1, EXPERT)
    changed(root / "half", root / "trained", NORM)
    paths = {"base": root / "base", "trained": root / "trained"}
    assert command("export-delta", **paths, output=root / "delta") == 0
    return root


def refused(capsys, status, *parts):
    assert status == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(part in message for part in parts), message


def test_it_holds_adapters_and_rows_and_no_merged_matrix(folders):
    index = json.loads((folders / "delta" / "delta.json").read_text())
    assert index["version"] == 2
    slices = {NORM, f"{FC1}@1.0"}
    assert set(index["slices"]) == slices
    assert index["adapters"]["base"]["checkpoint"] == str(folders / "base")
    names = set()
    for file in index["files"]:
        with safe_open(folders / "delta" / file, framework="pt") as stored:
            names |= set(stored.keys())
    added = {name for name in opened(folders / "trained").tensors if "inject" in name}
    assert names == slices | added
    trained = opened(folders / "trained")
    values = sum(trained.tensors[name].size.numel() for name in {NORM} | added)
    assert index["bytes"] == 4 * (values + whole(trained, FC1)[EXPERT].numel())


def test_applied_it_is_what_merging_gives(folders, tmp_path, capsys):
    paths = {"base": folders / "base", "delta": folders / "delta"}
    assert command("apply-delta", **paths, output=tmp_path / "applied") == 0
    assert "5 matrices merged" in capsys.readouterr().out
    paths = {"trained": folders / "trained", "output": tmp_path / "merged"}
    assert command("merge-adapters", **paths) == 0
    applied, merged = opened(tmp_path / "applied"), opened(tmp_path / "merged")
    held = set(opened(folders / "base").tensors)
    assert set(applied.tensors) == set(merged.tensors) == held
    for name in held:
        assert torch.equal(whole(applied, name), whole(merged, name)), name
    assert not torch.equal(whole(merged, FC1), whole(opened(folders / "base"), FC1))


def test_as_a_folder_it_is_what_merging_gives(folders, tmp_path):
    hf = str(folders / "hf")
    output = str(tmp_path / "delta")
    words = ["export-hf", "--delta", str(folders / "delta"), "--hf", hf, "--output", output]
    assert main(words) == 0
    paths = {"trained": folders / "trained", "output": tmp_path / "merged"}
    assert command("merge-adapters", **paths) == 0
    words = ["export-hf", str(tmp_path / "merged"), "--hf", hf, "--output", str(tmp_path / "out")]
    assert main(words) == 0
    for one in (tmp_path / "out").iterdir():
        assert one.read_bytes() == (tmp_path / "delta" / one.name).read_bytes(), one.name


def test_a_hybrid_students_adapters_go_onto_its_gpt_base(folders, tmp_path):
    """The delta has a GPT model's names where one of both is one, and goes onto either."""
    words = ["import-hf", str(folders / "hf"), "--layout", "hybrid"]
    assert main([*words, "--output", str(tmp_path / "base")]) == 0
    one = "decoder.layers.{}.mlp.experts.experts.linear_fc1.weight"
    qkv = "decoder.layers.0.self_attention.linear_qkv.weight"
    sites = {(one.format(3), (2,)): [0], (qkv, ()): [1]}
    write_adapters(tmp_path / "base", tmp_path / "trained", sites, ENTRIES, ids=IDS)
    paths = {"base": folders / "base", "trained": tmp_path / "trained"}
    assert command("export-delta", **paths, output=tmp_path / "delta") == 0
    index = json.loads((tmp_path / "delta" / "delta.json").read_text())
    places = {(m["tensor"], tuple(m["place"])) for m in index["adapters"]["matrices"]}
    assert places == {(FC1, (1, 2)), (QKV, (0,))}
    paths = {"trained": tmp_path / "trained", "output": tmp_path / "merged"}
    assert command("merge-adapters", **paths) == 0
    merged = opened(tmp_path / "merged")
    for kind, base in (("gpt", folders / "base"), ("hybrid", tmp_path / "base")):
        paths = {"base": base, "delta": tmp_path / "delta", "output": tmp_path / kind}
        assert command("apply-delta", **paths) == 0
    for name in merged.tensors:
        assert torch.equal(whole(opened(tmp_path / "hybrid"), name), whole(merged, name)), name
    assert torch.equal(
        whole(opened(tmp_path / "gpt"), FC1)[1], whole(merged, one.format(3))
    )  # block 1's experts are layer 3


@pytest.mark.parametrize(("name", "place"), [(FC1, (0, 1)), (EMBEDDING, (44,)), (NORM, ())])
def test_another_base_is_refused(folders, tmp_path, capsys, name, place):
    other = changed(folders / "base", tmp_path / "other", name, place)
    paths = {"base": other, "delta": folders / "delta", "output": tmp_path / "out"}
    refused(capsys, command("apply-delta", **paths), f"--base {other} holds other values of {name}")
    assert not (tmp_path / "out").exists()


def test_another_folder_is_refused(folders, tmp_path, capsys):
    save_folder("qwen3_moe", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    values = load_file(file)
    values["model.layers.1.self_attn.k_proj.weight"][0, 0] += 1
    save_file(values, file, {"format": "pt"})
    capsys.readouterr()
    words = ["export-hf", "--delta", str(folders / "delta"), "--hf", str(tmp_path / "hf")]
    status = main([*words, "--output", str(tmp_path / "out")])
    refused(capsys, status, "was not made from an import of", f"held other values of {QKV} [1]")


def test_export_knows_the_base_of_the_adapters(folders, tmp_path, capsys):
    other = changed(folders / "base", tmp_path / "other", QKV, (1,))
    paths = {"base": other, "trained": folders / "trained", "output": tmp_path / "out"}
    began = f"has adapters that began from {folders / 'base'}, and the base holds other values of"
    refused(capsys, command("export-delta", **paths), "--trained", began, f"{QKV} [1]", "as --base")


def test_adapters_of_a_base_are_not_left_out(folders, tmp_path, capsys):
    paths = {"base": folders / "trained", "output": tmp_path / "out"}
    told = "--base", "holds adapters or vocabulary rows beside its weights", "merge-adapters"
    refused(capsys, command("export-delta", **paths, trained=folders / "base"), *told)
    refused(capsys, command("apply-delta", **paths, delta=folders / "delta"), *told)
    words = ["export-hf", str(folders / "trained"), "--hf", str(folders / "hf")]
    status = main([*words, "--output", str(tmp_path / "out")])
    refused(capsys, status, "CKPT", *told[1:])
    assert not (tmp_path / "out").exists()


def _matrix(**changes):
    return lambda adapters: adapters["matrices"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_matrix(place=[0, 9]), "that is none of the base's"),
        (_matrix(place=[0]), "that is none of the base's"),
        (_matrix(tensor="optimizer.x"), "that is none of the base's"),
        (lambda a: a["matrices"].append(a["matrices"][0]), "that is none of the base's"),
        (lambda a: a["rows"].append(a["rows"][0]), "that is none of the base's"),
        (lambda a: a["rows"][0].update(ids=[7, 2]), "for 2 ids of a vocabulary"),
        (lambda a: a["rows"][0].update(ids=[7, 2, 999]), "for 3 ids of a vocabulary"),
        (lambda a: a["files"].popitem(), "does not hold the slices that it lists"),
        (lambda a: a.update(files=dict.fromkeys(a["files"], "../x")), "is none of its own"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(folders, tmp_path, capsys, change, message):
    (tmp_path / "delta").mkdir()
    for file in (folders / "delta").iterdir():
        (tmp_path / "delta" / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "delta" / "delta.json"
    index = json.loads(path.read_text())
    change(index["adapters"])
    path.write_text(json.dumps(index))
    paths = {"base": folders / "base", "delta": tmp_path / "delta", "output": tmp_path / "out"}
    refused(capsys, command("apply-delta", **paths), "--delta", message)
    assert not (tmp_path / "out").exists()
