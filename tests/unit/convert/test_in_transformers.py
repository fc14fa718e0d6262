"""What ``transformers`` makes of quantised folders is what stands in them without quantisation."""

import json

import pytest
import torch
import transformers

from megatron_moe_inject.convert.hf_folder import HfFolder
from megatron_moe_inject.convert.hf_writer import write_like
from tests.harness.hf_folder import FP8, MXFP4, in_fp8, in_mxfp4, write_folder

SIZES = {
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
}


def _gpt_oss():
    config = transformers.GptOssConfig(
        **SIZES, hidden_size=64, head_dim=16, intermediate_size=32, num_local_experts=3,
        layer_types=["full_attention"],
    )  # fmt: skip
    quantised = transformers.Mxfp4Config(dequantize=True)
    return config, MXFP4, in_mxfp4, lambda name: name.endswith("experts.down_proj"), quantised


def _qwen():
    # Whole blocks: transformers does not dequantise others.
    config = transformers.Qwen3MoeConfig(
        **SIZES, hidden_size=256, head_dim=64, intermediate_size=64, moe_intermediate_size=128,
        num_experts=3,
    )  # fmt: skip
    quantised = transformers.FineGrainedFP8Config(dequantize=True)
    return config, FP8, in_fp8, lambda name: "proj" in name, quantised


@pytest.mark.parametrize("make", [_gpt_oss, _qwen])
def test_quantised_and_not_are_the_same_model(tmp_path, make):
    config, quantization, encoded, is_quantised, quantised = make()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    plain = HfFolder.open("--hf", tmp_path / "plain")
    tensors = {}
    for name in plain.names:
        value = plain.read(name)
        tensors |= encoded(name, value) if is_quantised(name) else {name: value}
    write_folder(tmp_path / "quantised", {"model.safetensors": tensors})
    text = json.dumps({**plain.json, "quantization_config": quantization})
    (tmp_path / "quantised" / "config.json").write_text(text)
    folder = HfFolder.open("--hf", tmp_path / "quantised")
    assert set(folder.names) == set(plain.names)
    write_like(folder, tmp_path / "dropped", lambda name: None, quantized="drop")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder.path, dtype=torch.bfloat16, quantization_config=quantised
    )
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dropped", dtype="auto")
    assert ours.dtype == torch.bfloat16
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    tokens = torch.arange(10)[None]
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    assert not torch.equal(ours(tokens).logits, model(tokens).logits), "rounded by quantisation"
