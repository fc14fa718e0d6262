"""``export-adapters``: what PEFT, vLLM and SGLang load is what merging gives."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_moe_inject.cli import main
from megatron_moe_inject.host.torch_dist_copy import replaced, saved_copy
from tests.harness.adapted_folders import asked, python_with, write_adapted
from tests.harness.checkpoints import whole
from tests.harness.served_folders import save_tiny
from tests.harness.stored_adapters import opened
from tests.harness.tiny_folders import save_folder

IDS = [7, 2, 44]
ANY = ""
LAYERS = "decoder"
PEFT = {
    "qwen3_moe": (LAYERS, IDS),
    "qwen3_moe, one dense layer": (ANY, ()),
    "qwen3": (LAYERS, IDS),  # tied
    "qwen2_moe": (ANY, ()),
    "mixtral": (ANY, ()),
    "olmoe": ("linear_fc2", ()),
    "deepseek_v2": (ANY, ()),
    "deepseek_v3": (ANY, ()),
    "gpt_oss": (ANY, ()),
    "nemotron_h": (LAYERS, IDS),
    "gemma": (LAYERS, ()),
}
"""Which matrices have adapters, and ids of vocabulary rows, by case of ``tiny_folders``."""
NO_KV = r"decoder(?!.*kv_up)"
VLLM = {
    "llama": ANY,
    "qwen2": LAYERS,
    "qwen3": LAYERS,
    "gemma": LAYERS,
    "qwen3_moe": ANY,
    "qwen2_moe": LAYERS,
    "olmoe": LAYERS,
    "mixtral": ANY,
    "deepseek_v2": NO_KV,
    "deepseek_v3": NO_KV,
    "gpt_oss": LAYERS,
    "nemotron_h": r"decoder(?!.*router)",
}
"""Which matrices, by model type of ``served_folders``."""
SGLANG = (
    *("qwen3_moe", "mixtral", "deepseek_v3", "llama", "qwen2", "qwen3", "qwen2_moe", "olmoe"),
)
SERVED_ALONE = r"decoder(?!.*router)"


def export(root: Path, consumer: str) -> int:
    words = ["export-adapters", str(root / "adapted"), "--hf", str(root / "hf")]
    return main([*words, "--output", str(root / consumer), "--format", consumer])


def make(root: Path, save, case: str, pattern: str, **more) -> Path:
    """A folder, its import with adapters, and that merged, as ``hf``, ``adapted``, ``merged``."""
    root.mkdir()
    save(case, root / "hf")
    adapted = write_adapted(root / "hf", root, pattern, size=0.2, **more)
    checkpoint = str(root / "checkpoint")
    assert main(["merge-adapters", "--trained", str(adapted), "--output", checkpoint]) == 0
    words = ["export-hf", checkpoint, "--hf", str(root / "hf"), "--output", str(root / "merged")]
    assert main(words) == 0
    return root


def told(root: Path, consumer: str) -> dict[str, str]:
    return {k: str(root / v) for k, v in (("base", "hf"), ("merged",) * 2, ("adapters", consumer))}


def test_peft_gives_the_logits_of_the_merged_model(tmp_path):
    """In fp32; experts are fused parameters there, and no tensor is left out."""
    python = python_with("peft")
    roots = []
    for case, (pattern, ids) in PEFT.items():
        roots.append(make(tmp_path / case, save_folder, case, pattern, ids=ids))
        assert export(roots[-1], "peft") == 0
    answers = asked(python, "peft_model.py", [told(root, "peft") for root in roots])
    for case, answer in zip(PEFT, answers, strict=True):
        assert answer["dropped"] == [], case
        assert answer["off"] < 2e-5, (case, answer)
        assert answer["moved"] > 1, (case, answer)


def test_vllm_loads_all_of_it_in_the_places_of_the_weights(tmp_path):
    """By vLLM's own loader and layers: the low-rank change of each is that of its weights."""
    python = python_with("vllm")
    roots = []
    for case, pattern in VLLM.items():
        roots.append(make(tmp_path / case, save_tiny, case, pattern))
        assert export(roots[-1], "vllm") == 0
    answers = asked(python, "served_adapters.py", [told(root, "vllm") for root in roots])
    for case, answer in zip(VLLM, answers, strict=True):
        assert answer["error"] is None, (case, answer)
        assert (answer["unused"], answer["wrong"]) == ([], []), (case, answer)
        assert answer["right"] >= 8, (case, answer)


def test_sglang_takes_all_of_it(tmp_path):
    """By its own code: names that it puts together, and the targets that it finds for them."""
    source = os.environ.get("SGLANG_SOURCE")
    if source is None:
        pytest.skip("SGLANG_SOURCE names no folder with SGLang's wheel unpacked")
    folders = []
    for case in SGLANG:
        root = make(tmp_path / case, save_tiny, case, SERVED_ALONE)
        assert export(root, "sglang") == 0
        folders.append({"source": source, "adapters": str(root / "sglang")})
    for case, answer in zip(SGLANG, asked(sys.executable, "sglang_names.py", folders), strict=True):
        assert answer["dropped"] == [], case
        assert answer["ranks"] == [answer["rank"]], case
        assert answer["weights"] > 8, case


def changes_of(root: Path) -> dict[str, torch.Tensor]:
    """What merging changed, by the folder's tensors."""
    before, after = (load_file(root / name / "model.safetensors") for name in ("hf", "merged"))
    changed = {name: after[name].double() - value for name, value in before.items()}
    return {name: change for name, change in changed.items() if change.abs().max() > 0}


def products_of(folder: Path) -> dict[str, torch.Tensor]:
    """``alpha / r B A`` of each module, by PEFT's rule for patterns."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")

    def of(module, patterns, default):
        hits = [v for key, v in config[patterns].items() if re.match(rf"(.*\.)?({key})$", module)]
        return hits[0] if hits else config[default]

    products = {}
    for name, a in tensors.items():
        module, _, end = name.removeprefix("base_model.model.").rpartition(".lora_")
        if end == "A.weight":
            rank = of(module, "rank_pattern", "r")
            assert a.shape[0] == rank, name
            b = tensors[name.replace("lora_A", "lora_B")].double()
            scale = of(module, "alpha_pattern", "lora_alpha") / rank
            products[f"{module}.weight"] = scale * (b @ a.double())
    return products


@pytest.mark.parametrize(
    ("consumer", "case", "layout"),
    [
        *(("sglang", case, "gpt") for case in ("qwen3_moe", "mixtral", "deepseek_v3")),
        ("vllm", "qwen3_moe", "gpt"),
        ("vllm", "qwen3_moe", "hybrid"),
        ("vllm", "mixtral", "gpt"),
    ],
)
def test_modules_of_a_folder_change_as_its_weights(tmp_path, consumer, case, layout):
    root = make(tmp_path / "root", save_tiny, case, SERVED_ALONE, layout=layout)
    assert export(root, consumer) == 0
    products, changes = products_of(root / consumer), changes_of(root)
    assert changes.keys() <= products.keys()
    for name, product in products.items():
        expected = changes.get(name, torch.zeros(()).expand(product.shape))
        assert torch.allclose(product, expected.double(), atol=1e-6), name
    experts = [name for name in products.keys() - changes.keys() if ".experts." in name]
    assert len(experts) == len(products.keys() - changes.keys()), "zeros of experts alone"
    if consumer == "sglang":
        config = json.loads((root / "sglang" / "adapter_config.json").read_text())
        assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
        if case != "mixtral":  # whose weights SGLang renames
            assert set(config["target_modules"]) == {n.split(".")[-2] for n in products}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return make(tmp_path_factory.mktemp("qwen") / "root", save_folder, "qwen3_moe", LAYERS, ids=IDS)


def refused(capsys, status, *parts):
    assert status == 2
    (message,) = [m for m in capsys.readouterr().err.splitlines() if m.startswith("moe-inject: ")]
    assert all(part in message for part in parts), message


REMEDY = "moe-inject merge-adapters, then export-hf"


def test_what_a_server_would_drop_is_refused(qwen, tmp_path, capsys):
    rows = "has vocabulary rows (model.embed_tokens.weight, lm_head.weight), which"
    refused(capsys, export(qwen, "vllm"), rows, "vLLM 0.33", REMEDY)
    make(tmp_path / "router", save_folder, "qwen3_moe", "router")
    gate = "has adapters of model.layers.0.mlp.gate, which SGLang 0.5.23 does not apply"
    refused(capsys, export(tmp_path / "router", "sglang"), gate, REMEDY)
    make(tmp_path / "latent", save_folder, "deepseek_v3", "kv_up_proj")
    latent = "has adapters of model.layers.0.self_attn.kv_b_proj, which vLLM 0.33 does not apply"
    refused(capsys, export(tmp_path / "latent", "vllm"), latent, REMEDY)
    make(tmp_path / "fused", save_folder, "gpt_oss", "linear_fc1")
    refused(capsys, export(tmp_path / "fused", "sglang"), "is of a gpt_oss model", "SGLang 0.5.23")
    assert not list(tmp_path.glob("*/sglang")) + list(tmp_path.glob("*/vllm"))


def test_rows_alone_are_refused(tmp_path, capsys):
    make(tmp_path / "rows", save_folder, "qwen3", "nothing", ids=IDS)
    refused(capsys, export(tmp_path / "rows", "peft"), "has vocabulary rows alone", REMEDY)


def test_a_tensor_that_the_folder_keeps_once_is_refused(tmp_path, capsys):
    save_folder("gemma", tmp_path / "hf")
    write_adapted(tmp_path / "hf", tmp_path, "output_layer")
    refused(capsys, export(tmp_path, "peft"), "which the folder keeps as one tensor with another")


def test_what_else_was_trained_is_not_left_out(qwen, tmp_path, capsys):
    checkpoint, norm = opened(qwen / "adapted"), "decoder.final_layernorm.weight"
    new = whole(checkpoint, norm) + 1
    (tmp_path / "adapted").mkdir()
    change = {norm: replaced({(): lambda: new})}
    saved_copy(checkpoint, tmp_path / "adapted", change, lambda items, total: items)
    (tmp_path / "hf").symlink_to(qwen / "hf")
    refused(
        capsys, export(tmp_path, "peft"), "holds other values of model.norm.weight than",
        "name the folder that it was imported from", REMEDY,
    )  # fmt: skip
    assert not (tmp_path / "peft").exists()


def test_adapters_belong_to_a_model_by_its_checksum(qwen, tmp_path, capsys):
    assert export(qwen, "peft") == 0
    check = ["check-adapters", str(qwen / "peft"), "--hf"]
    assert main([*check, str(qwen / "hf")]) == 0
    capsys.readouterr()
    other = "is not the model that the adapters of"
    refused(capsys, main([*check, str(qwen / "merged")]), "--hf", other, str(qwen / "hf"))
    refused(capsys, main(["check-adapters", str(qwen), "--hf", str(qwen / "hf")]), "base.json")
    base = json.loads((qwen / "peft" / "base.json").read_text())
    assert (base["consumer"], base["checkpoint"]) == ("peft", str(qwen / "base"))


def test_nothing_to_export_is_an_error(qwen, tmp_path, capsys):
    words = ["export-adapters", str(qwen / "base"), "--hf", str(qwen / "hf"), "--output"]
    refused(capsys, main([*words, str(tmp_path / "out")]), "holds neither adapters nor vocabulary")
    (tmp_path / "out").mkdir()
    refused(capsys, main([*words, str(tmp_path / "out")]), "is there already")
