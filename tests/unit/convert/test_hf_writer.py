"""A folder written like another one: the same bytes where nothing changed, nothing half-written."""

import errno
import json
import os
import shutil
import string
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from megatron_moe_inject.convert import hf_writer
from megatron_moe_inject.convert.hf_folder import HfFolder
from megatron_moe_inject.convert.hf_writer import write_like
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.safetensors_file import DTYPES, stored_bytes
from tests.harness.hf_folder import FP8, MXFP4, in_fp8, in_mxfp4, write_folder

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WIDE = sorted(name for name, d in DTYPES.items() if not d.is_floating_point or d.itemsize > 1)


def _random(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def _with_beside(folder):
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "generation_config.json").write_text("{ }")
    (folder / "code").mkdir()
    (folder / "code" / "modeling.py").write_text("raise SystemExit")
    (folder / "consolidated.safetensors").write_bytes(b"other weights")


def _fp8_folder(path):
    """Codes in one file, their scales in the other."""
    weights = {f"experts.{i}.weight": _random(200, 130, seed=i) for i in range(3)}
    codes = [in_fp8(name, weight) for name, weight in weights.items()]
    first = {n: t for tensors in codes for n, t in tensors.items() if n.endswith("weight")}
    second = {n: t for tensors in codes for n, t in tensors.items() if n not in first}
    first["norm"] = _random(7, dtype=torch.float32)
    second["embed"] = _random(5, 4)
    write_folder(path, {FIRST: first, SECOND: second}, quantization_config=FP8, dtype="bfloat16")
    _with_beside(path)
    return HfFolder.open("--hf", path)


def _mxfp4_folder(path):
    tensors = in_mxfp4("experts.down_proj", _random(4, 64, 6)) | {"embed": _random(5, 4)}
    write_folder(path, {"model.safetensors": tensors}, quantization_config=MXFP4)
    return HfFolder.open("--hf", path)


def _same(path):
    write_folder(path, {"model.safetensors": {"a": _random(3, 5), "b": _random(2)}})
    return HfFolder.open("--hf", path)


@pytest.mark.parametrize("make", [_fp8_folder, _mxfp4_folder, _same])
def test_an_unchanged_folder_is_the_same_bit_for_bit(tmp_path, make):
    folder = make(tmp_path / "hf")
    report = write_like(folder, tmp_path / "deep" / "out", lambda name: None)
    expected = _files(tmp_path / "hf")
    left_out = [expected.pop(str(path), None) for path in report.left_out]
    assert left_out == ([b"other weights"] if make is _fp8_folder else [])
    assert _files(tmp_path / "deep" / "out") == expected
    assert set(report.tensors) == set(folder.names)
    assert not any(outcome.changed for outcome in report.tensors.values())
    assert os.listdir(tmp_path / "deep") == ["out"]


@settings(max_examples=30)
@given(st.data())
def test_any_tensors_are_copied_and_changed(tmp_path_factory, data):
    """Any types and shapes, none and empty ones too, in one file or two; some of them changed."""
    path = tmp_path_factory.mktemp("any")
    names = st.text(string.ascii_letters + "._é", min_size=1, max_size=8)
    shapes = st.lists(st.integers(0, 3), max_size=3)
    drawn = data.draw(
        st.dictionaries(names, st.tuples(st.sampled_from(WIDE), shapes), min_size=2, max_size=6)
    )
    tensors = {n: torch.zeros(s).to(DTYPES[d]) for n, (d, s) in drawn.items()}
    changed = {n for n, t in tensors.items() if t.is_floating_point() and data.draw(st.booleans())}
    cut = data.draw(st.integers(0, len(tensors) - 1))
    items = list(tensors.items())
    files = {FIRST: dict(items[:cut]), SECOND: dict(items[cut:])} if cut else {
        "model.safetensors": tensors
    }  # fmt: skip
    write_folder(path / "hf", files)
    folder = HfFolder.open("--hf", path / "hf")
    new = {name: torch.ones(tensors[name].shape, dtype=torch.float32) for name in changed}
    report = write_like(folder, path / "out", new.get)
    assert {n for n, outcome in report.tensors.items() if outcome.changed} == changed
    again = HfFolder.open("--hf", path / "out")
    assert again.names == folder.names
    for name, tensor in tensors.items():
        expected = torch.ones_like(tensor) if name in changed else tensor
        assert stored_bytes(again.read(name)) == stored_bytes(expected)
    for name in files:
        one, other = (f.files.files[name] for f in (folder, again))
        assert one.header == other.header


def test_changed_values_are_rounded_to_the_folder_s_type_and_the_rounding_is_told(tmp_path):
    folder = _same(tmp_path / "hf")
    new = 100 * _random(3, 5, dtype=torch.float32, seed=3)
    report = write_like(folder, tmp_path / "out", {"a": new}.get)
    again = HfFolder.open("--hf", tmp_path / "out")
    assert torch.equal(again.read("a"), new.bfloat16())
    assert torch.equal(again.read("b"), folder.read("b"))
    outcome = report.tensors["a"]
    off = (new - new.bfloat16().float()).abs()
    assert outcome.largest == pytest.approx(float(off.max() / new.abs().max()))
    assert outcome.mean == pytest.approx(float(off.sum() / new.abs().sum()))
    assert (outcome.elements, outcome.changed, outcome.storage) == (15, True, "plain")
    assert not report.tensors["b"].changed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_changed_experts_are_encoded_and_the_others_keep_their_codes(tmp_path, dtype):
    folder = _fp8_folder(tmp_path / "fp8")
    new = _random(200, 130, dtype=dtype, seed=7)
    report = write_like(folder, tmp_path / "out", {"experts.1.weight": new}.get)
    again = HfFolder.open("--hf", tmp_path / "out")
    same = [n for n in folder.names if torch.equal(folder.read(n), again.read(n))]
    assert set(folder.names) - set(same) == {"experts.1.weight"}
    assert again.storage("experts.1.weight") == "fp8"
    outcome = report.tensors["experts.1.weight"]
    off = (again.read("experts.1.weight", dtype=torch.float32) - new.float()).abs()
    assert outcome.largest == pytest.approx(float(off.max() / new.float().abs().max()), rel=1e-4)
    assert 2**-8 < outcome.mean < 2**-4
    assert _files(tmp_path / "out")["config.json"] == _files(tmp_path / "fp8")["config.json"]

    folder = _mxfp4_folder(tmp_path / "fp4")
    new = folder.read("experts.down_proj", dtype=dtype)
    new[2] = _random(64, 6, seed=7)
    report = write_like(folder, tmp_path / "out4", {"experts.down_proj": new}.get)
    again = HfFolder.open("--hf", tmp_path / "out4")
    for name, old in folder.raw("experts.down_proj").items():
        expert = (again.raw("experts.down_proj")[name] != old).flatten(1).any(1)
        assert expert.tolist() == [False, False, True, False]
    assert 0 < report.tensors["experts.down_proj"].mean < 2**-3


@pytest.mark.parametrize("make", [_fp8_folder, _mxfp4_folder])
def test_without_quantisation_everything_is_in_the_model_s_type(tmp_path, make):
    folder = make(tmp_path / "hf")
    quantised = [name for name in folder.names if folder.storage(name) != "plain"]
    new = _random(*folder.shape(quantised[1 % len(quantised)]), dtype=torch.float32, seed=9)
    changed = {quantised[1 % len(quantised)]: new}
    report = write_like(folder, tmp_path / "out", changed.get, quantized="drop")
    again = HfFolder.open("--hf", tmp_path / "out")
    assert set(again.names) == set(folder.names)
    assert "quantization_config" not in again.json
    assert {k: v for k, v in folder.json.items() if k != "quantization_config"} == again.json
    for name in folder.names:
        expected = new.bfloat16() if name in changed else folder.read(name)
        assert again.storage(name) == "plain"
        assert torch.equal(again.read(name), expected)
        assert report.tensors[name].changed == (name in changed)
    for name, file in again.files.files.items():
        with safe_open(file.path, framework="pt") as theirs:
            assert set(theirs.keys()) == set(file.tensors)
            assert theirs.metadata() == {"format": "pt"}
        assert folder.files.files[name].metadata == file.metadata
    if (tmp_path / "hf" / INDEX).exists():
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert set(index["weight_map"]) == set(folder.names)
        assert index["metadata"]["total_size"] == report.bytes - sum(
            len(file.header) for file in again.files.files.values()
        )


def test_a_file_that_held_scales_alone_is_not_written_without_them(tmp_path):
    tensors = in_fp8("a", _random(128, 128))
    files = {FIRST: {"a": tensors["a"]}, SECOND: {"a_scale_inv": tensors["a_scale_inv"]}}
    folder = HfFolder.open("--hf", write_folder(tmp_path / "hf", files, quantization_config=FP8))
    write_like(folder, tmp_path / "out", lambda name: None, quantized="drop")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", FIRST, INDEX]
    assert torch.equal(HfFolder.open("--hf", tmp_path / "out").read("a"), folder.read("a"))


def test_further_files_and_progress(tmp_path):
    folder = _same(tmp_path / "hf")
    seen = []

    def progress(names, total):
        assert total == 2
        for name in names:
            seen.append(name)
            yield name

    beside = {"export.json": b"{}"}
    write_like(folder, tmp_path / "out", lambda n: None, beside=beside, progress=progress)
    assert seen == ["a", "b"]
    assert (tmp_path / "out" / "export.json").read_bytes() == b"{}"


def test_values_that_do_not_fit(tmp_path):
    folder = _mxfp4_folder(tmp_path / "hf")
    for name, value, problem in (
        ("embed", torch.ones(4, 5), r"embed as \[5, 4\], the new values are \[4, 5\]"),
        ("experts.down_proj", torch.full((4, 64, 6), torch.inf), "MXFP4, and .* not all finite"),
    ):
        with pytest.raises(RecipeError, match=problem):
            write_like(folder, tmp_path / "out", {name: value}.get)
        assert os.listdir(tmp_path) == ["hf"]


def test_an_output_that_is_there(tmp_path):
    folder = _same(tmp_path / "hf")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for output in (tmp_path / "hf", tmp_path / "hf" / "config.json", tmp_path / "link"):
        with pytest.raises(RecipeError, match=r"--output: .* is there already; name a new folder"):
            write_like(folder, output, lambda name: None)


def test_a_disk_without_room_is_known_at_once(tmp_path, monkeypatch):
    folder = _same(tmp_path / "hf")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(RecipeError, match=r"--output: .* needs \d+ B, of which 10 B are free"):
        write_like(folder, tmp_path / "out", lambda name: pytest.fail("asked for values"))
    assert os.listdir(tmp_path) == ["hf"]


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch, calls):
    folder = _fp8_folder(tmp_path / "hf")
    write, done = hf_writer._write, []

    def full(*args):
        done.append(args)
        if len(done) > calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*args)

    monkeypatch.setattr(hf_writer, "_write", full)
    with pytest.raises(RecipeError, match=r"cannot be written \(No space left on device\)"):
        write_like(folder, tmp_path / "out", lambda name: None)
    assert os.listdir(tmp_path) == ["hf"]


def test_a_folder_that_breaks_while_it_is_read_leaves_nothing(tmp_path):
    folder = _same(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RecipeError, match=r"--hf: .* holds model.safetensors, which ends within"):
        write_like(folder, tmp_path / "out", lambda name: None)
    assert os.listdir(tmp_path) == ["hf"]


def test_a_cache_snapshot_becomes_plain_files(tmp_path):
    _same(tmp_path / "real")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for number, path in enumerate(sorted((tmp_path / "real").iterdir())):
        shutil.copyfile(path, tmp_path / "models--a--b" / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    write_like(HfFolder.open("--hf", snapshot), tmp_path / "out", lambda name: None)
    assert _files(tmp_path / "out") == _files(tmp_path / "real")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
