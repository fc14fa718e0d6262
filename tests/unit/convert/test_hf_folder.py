"""Hugging Face folders: what they hold by logical name, and every way in which one is damaged."""

import json
import os
import shutil

import pytest
import torch

from megatron_moe_inject.convert.hf_folder import HfFolder
from megatron_moe_inject.host.errors import RecipeError
from tests.harness.hf_folder import FP8, MXFP4, in_fp8, in_mxfp4, write_file, write_folder

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def _random(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _two_files(folder, **config):
    first = {"b": _random(3, 4), "a": _random(2, dtype=torch.float32)}
    second = {"c": _random(2, 5, 6, seed=1), "bias": torch.zeros(0)}
    write_folder(folder, {FIRST: first, SECOND: second}, **config)
    return first | second


def _error(folder):
    with pytest.raises(RecipeError) as caught:
        HfFolder.open("--hf", folder)
    text = str(caught.value)
    assert text.startswith("--hf: ")
    assert caught.value.key == "--hf"
    assert len(text.splitlines()) == 1
    return text


def test_names_shapes_types_and_values(tmp_path):
    tensors = _two_files(tmp_path)
    folder = HfFolder.open("--hf", str(tmp_path))
    assert folder.names == ("a", "b", "bias", "c"), "by file, then by place in it"
    assert folder.config.model_type == "llama"
    assert folder.json["vocab_size"] == 32
    assert "b" in folder
    assert "d" not in folder
    for name, tensor in tensors.items():
        assert folder.shape(name) == tensor.shape
        assert folder.dtype(name) == tensor.dtype
        assert folder.storage(name) == "plain"
        assert folder.size(name) == tensor.nbytes
        assert torch.equal(folder.read(name), tensor)
        assert torch.equal(folder.raw(name)[name], tensor)
        assert torch.equal(folder.read(name, dtype=torch.float64), tensor.double())
    assert torch.equal(folder.read("c", (1, 3)), tensors["c"][1, 3])


def test_one_file_needs_no_index(tmp_path):
    write_folder(tmp_path, {"model.safetensors": {"a": _random(3)}})
    assert HfFolder.open("--hf", tmp_path).names == ("a",)


def test_quantised_tensors_have_the_names_of_the_model(tmp_path):
    weight = _random(130, 200)
    fp8 = in_fp8("a.weight", weight)
    scales_elsewhere = {"a.weight_scale_inv": fp8.pop("a.weight_scale_inv"), "norm": _random(3)}
    write_folder(tmp_path / "fp8", {FIRST: fp8, SECOND: scales_elsewhere}, quantization_config=FP8)
    folder = HfFolder.open("--hf", tmp_path / "fp8")
    assert folder.names == ("a.weight", "norm")
    assert (folder.storage("a.weight"), folder.storage("norm")) == ("fp8", "plain")
    assert (folder.shape("a.weight"), folder.dtype("a.weight")) == ((130, 200), torch.bfloat16)
    assert set(folder.raw("a.weight")) == {"a.weight", "a.weight_scale_inv"}
    assert (folder.read("a.weight") - weight).abs().max() < 2**-4 * weight.abs().max()
    assert folder.read("a.weight", dtype=torch.float32).dtype == torch.float32
    assert folder.size("a.weight") == 130 * 200 + 2 * 2 * 4
    assert folder.logical("a.weight_scale_inv") == ("a.weight", "_scale_inv")

    experts = _random(3, 64, 10)
    tensors = in_mxfp4("gate_up_proj", experts) | {"gate_up_proj_bias": _random(3, 10)}
    write_folder(tmp_path / "fp4", {"model.safetensors": tensors}, quantization_config=MXFP4)
    folder = HfFolder.open("--hf", tmp_path / "fp4")
    assert set(folder.names) == {"gate_up_proj", "gate_up_proj_bias"}
    assert folder.shape("gate_up_proj") == (3, 64, 10)
    whole = folder.read("gate_up_proj")
    assert (whole - experts).abs().max() <= 2**-2 * experts.abs().max()
    assert torch.equal(folder.read("gate_up_proj", (2,)), whole[2])


def test_a_snapshot_of_the_cache_is_read_through_its_links(tmp_path):
    tensors = _two_files(tmp_path / "real")
    (tmp_path / "real" / "sub").mkdir()
    (tmp_path / "real" / "sub" / "notes.txt").write_text("x")
    (tmp_path / "real" / "tokenizer.json").write_text("{}")
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "4d7a"
    for number, path in enumerate(sorted(p for p in (tmp_path / "real").rglob("*") if p.is_file())):
        blob = cache / "blobs" / str(number)
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(tmp_path / "real")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (tmp_path / "latest").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "latest"):
        folder = HfFolder.open("--hf", path)
        assert torch.equal(folder.read("c"), tensors["c"])
        kept, _ = folder.plain_files()
        assert [str(p) for p in kept] == ["sub/notes.txt", "tokenizer.json"]
    assert f"name a snapshot in it: {snapshot}" in _error(cache)


@pytest.mark.parametrize("name", [SECOND, "tokenizer.json"])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path, name):
    _two_files(tmp_path / "hf")
    path = tmp_path / "hf" / name
    (tmp_path / "elsewhere").write_bytes(path.read_bytes() if path.exists() else b"{}")
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecipeError, match=rf"holds {name}, a symbolic link out of it"):
        HfFolder.open("--hf", tmp_path / "hf").plain_files()


def test_a_link_within_the_folder_is(tmp_path):
    _two_files(tmp_path / "hf")
    (tmp_path / "hf" / SECOND).rename(tmp_path / "hf" / "shard")
    (tmp_path / "hf" / SECOND).symlink_to("shard")
    assert "c" in HfFolder.open("--hf", tmp_path / "hf")


def test_other_files(tmp_path):
    _two_files(tmp_path)
    for name in (
        "tokenizer.json", "chat_template.jinja", "consolidated.safetensors", "model.bin.index.json",
        ".gitattributes", "inference/model.py", "original/a.pth", "original/params.json",
        ".cache/huggingface/download.lock", ".git/config",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    kept, weights = HfFolder.open("--hf", tmp_path).plain_files()
    assert [str(path) for path in kept] == [
        ".gitattributes", "chat_template.jinja", "inference/model.py", "original/params.json",
        "tokenizer.json",
    ]  # fmt: skip
    assert [str(path) for path in weights] == [
        "consolidated.safetensors", "model.bin.index.json", "original/a.pth"
    ]  # fmt: skip


def test_other_files_that_cannot_be_copied(tmp_path):
    _two_files(tmp_path)
    folder = HfFolder.open("--hf", tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(RecipeError, match=r"tokenizer.json, which is a pointer of git-lfs .* pull"):
        folder.plain_files()
    (tmp_path / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecipeError, match="holds pipe, which is no plain file; remove it"):
        folder.plain_files()


def test_no_folder(tmp_path):
    assert "is no directory on this machine; name the folder" in _error(tmp_path / "not there")
    assert "hf download Qwen/Qwen3-30B-A3B --local-dir DIR" in _error("Qwen/Qwen3-30B-A3B")
    (tmp_path / "file").write_text("x")
    assert "is no directory; name the folder" in _error(tmp_path / "file")
    assert "has no config.json" in _error(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is an adapter" in _error(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "has no readable config.json"),
        ("[]", "it is no mapping"),
        ("\xff", "has no readable config.json"),
        ("version https://git-lfs.github.com/spec/v1\n", "pointer of git-lfs; run git lfs pull"),
        ('{"model_type": "martian"}', "that transformers"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "that transformers"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', "gptq"),
        ('{"model_type": "llama", "quantization_config": "int4"}', "quant_method int4"),
        (
            '{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}',
            "weight_block_size None",
        ),
    ],
)
def test_configurations_that_cannot_be_read(tmp_path, content, problem):
    _two_files(tmp_path)
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    assert problem in _error(tmp_path)


def test_a_transformers_that_does_not_tell_its_defaults(tmp_path, monkeypatch):
    import transformers

    _two_files(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: object())
    assert "install transformers 5.24 or later" in _error(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", f"has no readable {INDEX}"),
        ("{}", "no weight_map"),
        ('{"weight_map": [1]}', "no weight_map"),
        ('{"weight_map": {"a": "../x"}}', "which is none of its own"),
        ('{"weight_map": {"a": 3}}', "which is none of its own"),
        ('{"weight_map": {}}', "holds no tensors"),
        (f'{{"weight_map": {{"a": "{SECOND}"}}}}', f"names a in {INDEX}, which {SECOND} does not"),
        (f'{{"weight_map": {{"d": "{FIRST}"}}}}', f"names d in {INDEX}, which {FIRST} does not"),
    ],
)
def test_an_index_that_is_damaged(tmp_path, content, problem):
    _two_files(tmp_path)
    (tmp_path / INDEX).write_text(content)
    assert problem in _error(tmp_path)


def test_files_that_are_missing(tmp_path):
    _two_files(tmp_path)
    (tmp_path / SECOND).unlink()
    assert f"lacks {SECOND}, which its index names" in _error(tmp_path)
    (tmp_path / INDEX).unlink()
    assert f"holds {FIRST}, but no {INDEX}" in _error(tmp_path)
    (tmp_path / FIRST).unlink()
    assert "holds neither" in _error(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert "pytorch_model.bin and not as safetensors; convert them" in _error(tmp_path)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "a.gguf")
    assert "as GGUF (a.gguf)" in _error(tmp_path)


def test_files_that_are_damaged(tmp_path):
    _two_files(tmp_path)
    whole = (tmp_path / SECOND).read_bytes()
    (tmp_path / SECOND).write_bytes(whole[:-1])
    assert f"holds {SECOND}, which is cut off" in _error(tmp_path)
    (tmp_path / SECOND).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\n")
    assert "is a pointer of git-lfs and not the file itself; run git lfs pull" in _error(tmp_path)
    (tmp_path / SECOND).write_bytes(whole)
    folder = HfFolder.open("--hf", tmp_path)
    (tmp_path / SECOND).write_bytes(whole[:-1])
    with pytest.raises(RecipeError, match="which ends within c"):
        folder.read("c")
    (tmp_path / SECOND).unlink()
    with pytest.raises(RecipeError, match=r"cannot give c \(No such file or directory\)"):
        folder.read("c")


def test_a_tensor_in_two_files_and_two_models_in_a_folder(tmp_path):
    tensors = _two_files(tmp_path)
    write_file(tmp_path / SECOND, {"c": tensors["c"], "b": tensors["b"]})
    assert f"holds b twice, in {FIRST} and {SECOND}" in _error(tmp_path)
    _two_files(tmp_path)
    write_file(tmp_path / "model.safetensors", tensors)
    assert f"holds both {INDEX} and model.safetensors" in _error(tmp_path)


def test_codes_without_scales_and_scales_that_do_not_fit(tmp_path):
    codes = in_fp8("a", _random(128, 256))
    alone = {"a": codes["a"]}
    write_folder(tmp_path, {"model.safetensors": alone}, quantization_config=FP8)
    assert "holds a as float8_e4m3fn [128, 256]: these are codes" in _error(tmp_path)
    write_folder(tmp_path, {"model.safetensors": codes})
    assert "whose scales or quantization_config are missing" in _error(tmp_path)
    for wrong in (torch.ones(2, 1), torch.ones(1, 2, dtype=torch.float16)):
        tensors = {**codes, "a_scale_inv": wrong}
        write_folder(tmp_path, {"model.safetensors": tensors}, quantization_config=FP8)
        assert "scales one for each block of 128 x 128" in _error(tmp_path)
    blocks = in_mxfp4("a", _random(64, 3))
    for wrong in (torch.ones(3, 2), torch.ones(3, 1, dtype=torch.uint8)):
        tensors = {**blocks, "a_scales": wrong}
        write_folder(tmp_path, {"model.safetensors": tensors}, quantization_config=MXFP4)
        assert "blocks are uint8 [..., G, 16]" in _error(tmp_path)


def test_an_index_may_be_silent_about_a_tensor(tmp_path):
    _two_files(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["bias"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "bias" in HfFolder.open("--hf", tmp_path)
