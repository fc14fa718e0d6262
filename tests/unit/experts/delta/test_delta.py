"""Deltas and checkpoints that others may have written: no name leads out of their folders."""

import dataclasses
import hashlib
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp

from megatron_moe_inject.cli import main
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.errors import (
    RecipeError,
)
from megatron_moe_inject.host.torch_dist import Piece

EXPERTS = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
WEIGHTS = {
    EXPERTS: torch.arange(48.0).view(2, 3, 4, 2),
    "output_layer.weight": torch.arange(6.0).view(3, 2),
    "optimizer.state.exp_avg.output_layer.weight": torch.ones(3, 2),
}


def write_checkpoint(folder, weights):
    dcp.save(dict(weights), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return folder


@pytest.fixture
def base(tmp_path):
    return write_checkpoint(tmp_path / "work" / "base", WEIGHTS)


@pytest.fixture
def trained(tmp_path):
    changed = WEIGHTS[EXPERTS].clone()
    changed[1, 2] = -1.0
    return write_checkpoint(tmp_path / "work" / "trained", WEIGHTS | {EXPERTS: changed})


@pytest.fixture
def delta(base, trained, capsys):
    folder = base.parent / "delta"
    assert main(["export-delta", *options(base=base, trained=trained, output=folder)]) == 0
    capsys.readouterr()
    return folder


def options(**paths):
    return [part for name, path in paths.items() for part in (f"--{name}", str(path))]


def refused(capsys, arguments, *parts):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(part in message for part in parts), message


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_metadata(base, change):
    """Rewrite where ``.metadata`` says that the parts are; ``change`` maps one place to another."""
    path = base / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.storage_data = {
        index: dataclasses.replace(info, **change(info))
        for index, info in metadata.storage_data.items()
    }
    path.write_bytes(pickle.dumps(metadata))


def weight(folder, name):
    checkpoint = CheckpointPlace("--base", folder).open()
    target = torch.empty(checkpoint.tensors[name].size)
    checkpoint.read([Piece(name, tuple(target.shape), (0,) * target.dim(), target)])
    return target


def test_the_base_with_its_delta_is_what_was_trained(base, trained, delta, tmp_path, capsys):
    link = tmp_path / "link"
    link.symlink_to(base)  # a link that the user names is the user's business
    arguments = ["apply-delta", *options(base=link, delta=delta, output=tmp_path / "out")]
    assert main(arguments) == 0
    assert "1 slices (32 B) replaced" in capsys.readouterr().out
    for name in list(WEIGHTS)[:2]:
        assert torch.equal(weight(tmp_path / "out", name), weight(trained, name))
    assert sorted(os.listdir(tmp_path / "out" / "release")) == [
        *(".metadata", "__0_0.distcp", "metadata.json"),
    ]


@pytest.mark.parametrize("name", ["../../x", "{home}/x", ".metadata", "", "..", "a/b", "a\\b", 7])
def test_a_checkpoint_that_names_files_of_others_is_refused(base, delta, tmp_path, capsys, name):
    """``../../x`` from the iteration's folder in the output is ``x`` beside the output."""
    for victim in (tmp_path / "x", base.parent.parent / "x"):
        victim.write_bytes(b"the user's" * 100)
    name = name.format(home=tmp_path) if isinstance(name, str) else name
    change_metadata(base, lambda info: {"relative_path": name})
    before = contents(tmp_path)
    apply = ["apply-delta", *options(base=base, delta=delta, output=tmp_path / "out")]
    refused(capsys, apply, f"names a file {name!r} in .metadata, which is none of its own")
    export = ["export-delta", *options(base=base, trained=base, output=tmp_path / "out")]
    refused(capsys, export, "none of its own")
    assert contents(tmp_path) == before
    with pytest.raises(RecipeError, match="none of its own"):  # as any reader, of a teacher say
        CheckpointPlace("--base", base).open()


@pytest.mark.parametrize("place", [{"offset": -1}, {"length": -5}, {"offset": "0"}])
def test_places_that_cannot_be_are_one_error(base, delta, tmp_path, capsys, place):
    change_metadata(base, lambda info: place)
    arguments = ["apply-delta", *options(base=base, delta=delta, output=tmp_path / "out")]
    refused(capsys, arguments, "cannot be read", ".metadata")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["__0_0.distcp", "notes.txt", "more/secret"])
def test_links_of_a_base_are_not_followed(base, delta, tmp_path, capsys, where):
    secret, link = tmp_path / "secret", base / where
    link.parent.mkdir(exist_ok=True)
    if link.exists():
        link.rename(secret)
    else:
        secret.write_text("of the user")
    link.symlink_to(secret)
    arguments = ["apply-delta", *options(base=base, delta=delta, output=tmp_path / "out")]
    refused(capsys, arguments, f"holds {link}, a symbolic link, which is not followed", "cp -rL")
    assert not (tmp_path / "out").exists()


def change_index(delta, change):
    path = delta / "delta.json"
    index = json.loads(path.read_text())
    change(index, next(iter(index["slices"].values())))
    path.write_text(json.dumps(index))


def _file(name):
    return lambda index, entry: entry.update(file=name)


def _listed(name):
    return lambda index, entry: index["files"].update({name: "0" * 64})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_file("../other/delta-00001.safetensors"), "names a file '../other/delta-00001.safetens"),
        (_file("delta-00002.safetensors"), "names a file 'delta-00002.safetensors', which is none"),
        (_listed("../base/__0_0.distcp"), "names a file '../base/__0_0.distcp', which is none of"),
        (_listed("/etc/passwd"), "names a file '/etc/passwd'"),
        (lambda index, entry: entry.update(place=[1, 3]), "a slice 'decoder."),
        (lambda index, entry: entry.update(place=[1, -1]), "that is none of the base's"),
        (lambda index, entry: entry.update(place=[1]), "that is none of the base's"),
        (lambda index, entry: entry.update(tensor="optimizer.x"), "that is none of the base's"),
        (lambda index, entry: entry.update(place="12"), "place: '12' is not a list"),
        (lambda index, entry: entry.pop("base_sha256"), "base_sha256: missing"),
        (lambda index, entry: index.update(slices=[]), "slices: [] is not a mapping"),
        (lambda index, entry: index["slices"].clear(), "does not hold the slices that it lists"),
        (lambda index, entry: index.update(files=None), "files: None is not a mapping"),
    ],
)
def test_an_index_that_names_what_is_not_its_own_is_refused(
    base, delta, tmp_path, capsys, change, message
):
    other = delta.parent / "other"
    other.mkdir()
    for file in delta.glob("*.safetensors"):
        (other / file.name).write_bytes(file.read_bytes())
        (delta / "delta-00002.safetensors").write_bytes(file.read_bytes())
    change_index(delta, change)
    before = contents(tmp_path)
    arguments = ["apply-delta", *options(base=base, delta=delta, output=tmp_path / "out")]
    refused(capsys, arguments, "--delta", message)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("values", [torch.zeros(1, 2), torch.zeros(4, 2, dtype=torch.bfloat16)])
def test_values_of_another_shape_or_type_are_refused(base, delta, tmp_path, capsys, values):
    """Even with right checksums: a row would be spread over the matrix without a word."""
    (file,) = delta.glob("*.safetensors")
    save_file(dict.fromkeys(load_file(file), values), file)
    checksum = hashlib.sha256(file.read_bytes()).hexdigest()
    change_index(delta, lambda index, entry: index["files"].update({file.name: checksum}))
    arguments = ["apply-delta", *options(base=base, delta=delta, output=tmp_path / "out")]
    refused(capsys, arguments, "which the base has as [4, 2] torch.float32")
    assert sorted(os.listdir(tmp_path)) == ["work"]


def test_both_commands_start_without_megatron_and_say_nothing_foreign(base, trained, tmp_path):
    script = (
        "import sys; from megatron_moe_inject.cli import main; status = main(sys.argv[1:]); "
        "assert not [m for m in sys.modules if m.startswith(('megatron.', 'transformers'))]; "
        "sys.exit(status)"
    )
    quiet = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
    for command in (
        ["export-delta", *options(base=base, trained=trained, output=tmp_path / "delta")],
        ["apply-delta", *options(base=base, delta=tmp_path / "delta", output=tmp_path / "out")],
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, *command], capture_output=True, text=True, env=quiet
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert str(command[-1]) in done.stdout
        assert len(done.stdout.splitlines()) <= 3
