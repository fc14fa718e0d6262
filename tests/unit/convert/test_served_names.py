"""Names of an exported folder against vLLM's: the data, and vLLM itself where it is installed."""

import re

import pytest

from megatron_moe_inject.cli import main
from tests.harness.served_folders import CONFIGS, asked_of_vllm, keys_of, save_tiny
from tests.harness.served_names import PATTERNS, incomplete_for_vllm, unknown_to_vllm

CONVERTED = tuple(name for name in CONFIGS if name not in ("gemma2", "gemma3_text"))
FOREIGN = (
    "nonsense.weight",
    "transformer.h.0.attn.weight",
    "model.nonsense.weight",
    "model.layers.0.mlp.nonsense.weight",
    "model.layers.1.mlp.experts.0.nonsense.weight",
    "model.layers.0.self_attn.linear_qkv.weight",
    "model.layers.0.input_layernorm.bias",
    "lm_head.bias",
    "decoder.layers.0.mlp.router.weight",
)
"""Names of no architecture: each of them has to be told, whether vLLM refuses or drops it."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny folder of each architecture."""
    root = tmp_path_factory.mktemp("folders")
    for model_type in CONFIGS:
        save_tiny(model_type, root / model_type)
    return root


def one_of_each(keys):
    """One key of each kind: numbers aside they all differ."""
    return list(
        {re.sub(r"\.\d+\.", ".#.", re.sub(r"\.\d+\.", ".#.", key)): key for key in keys}.values()
    )


def test_there_is_a_folder_of_each_architecture():
    assert set(CONFIGS) == set(PATTERNS)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_what_transformers_writes_is_known_and_complete(folders, model_type):
    keys = keys_of(folders / model_type)
    assert unknown_to_vllm(model_type, keys) == []
    assert incomplete_for_vllm(model_type, keys) == []
    assert unknown_to_vllm(model_type, [*keys, *FOREIGN]) == list(FOREIGN)


def test_one_expert_or_one_part_of_a_stack_is_missed():
    layers = [f"model.layers.{layer}." for layer in range(2)]
    keys = [
        f"{layer}mlp.experts.{expert}.{part}_proj.weight"
        for layer in layers
        for expert in range(12)
        for part in ("gate", "up", "down")
    ]
    keys += [f"{layer}self_attn.{part}_proj.weight" for layer in layers for part in "qkv"]
    assert incomplete_for_vllm("qwen3_moe", keys) == []
    gone = [
        "model.layers.0.mlp.experts.10.up_proj.weight",
        "model.layers.1.mlp.experts.11.gate_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
    ]
    assert incomplete_for_vllm("qwen3_moe", set(keys) - set(gone)) == gone


def test_published_folders_of_deepseek_v3_are_known():
    layer = "model.layers.61."
    scales = ("self_attn.q_a_proj", "mlp.experts.255.down_proj", "mlp.shared_experts.up_proj")
    next_tokens = (
        "embed_tokens",
        "enorm",
        "hnorm",
        "eh_proj",
        "shared_head.norm",
        "shared_head.head",
    )
    keys = [f"{layer}{name}.weight_scale_inv" for name in scales]
    keys += [f"{layer}{name}.weight" for name in next_tokens]
    assert unknown_to_vllm("deepseek_v3", keys) == []
    assert unknown_to_vllm("deepseek_v2", keys) == keys
    assert unknown_to_vllm("deepseek_v3", [f"{layer}mlp.gate.weight_scale_inv"]) != []


@pytest.fixture(scope="module")
def exported(folders):
    """The folders after a way through Megatron and back."""
    root = folders / "exported"
    root.mkdir()
    for model_type in CONVERTED:
        checkpoint = str(root / f"{model_type}-checkpoint")
        folder = str(folders / model_type)
        assert main(["import-hf", folder, "--output", checkpoint]) == 0
        export = ["export-hf", checkpoint, "--hf", folder, "--output", str(root / model_type)]
        assert main(export) == 0
    return root


@pytest.mark.parametrize("model_type", CONVERTED)
def test_an_exported_folder_is_known_and_complete(exported, model_type):
    keys = keys_of(exported / model_type)
    assert unknown_to_vllm(model_type, keys) == []
    assert incomplete_for_vllm(model_type, keys) == []


def test_vllm_reads_an_exported_folder_whole(exported):
    answers = asked_of_vllm([{"folder": str(exported / name)} for name in CONVERTED])
    for name, answer in zip(CONVERTED, answers, strict=True):
        wrong = answer["error"] or answer["unreported"] or answer["unwritten"]
        assert not wrong, (name, answer)


def test_vllm_reads_what_the_data_says_and_misses_what_it_says(folders):
    cases, expected = [], []
    for model_type in CONFIGS:
        folder = str(folders / model_type)
        keys = keys_of(folders / model_type)
        cases.append({"folder": folder})
        expected.append("whole")
        for key in one_of_each(keys):
            cases.append({"folder": folder, "drop": [key]})
            stacked = incomplete_for_vllm(model_type, set(keys) - {key}) == [key]
            expected.append("unnoticed" if stacked else "noticed")
        for key in FOREIGN:
            cases.append({"folder": folder, "add": {key: [4, 4]}})
            expected.append("foreign")
    wrong = []
    for case, kind, answer in zip(cases, expected, asked_of_vllm(cases), strict=True):
        if kind == "whole":
            right = not answer["error"] and not answer["unreported"] and not answer["unwritten"]
        elif kind == "unnoticed":
            right = not answer["error"] and not answer["unreported"] and answer["unwritten"]
        elif kind == "noticed":
            right = answer["error"] or answer["unreported"]
        else:
            right = answer["error"] or not (answer["unreported"] or answer["unwritten"])
        if not right:
            wrong.append((kind, case, answer))
    assert not wrong, wrong[:3]
