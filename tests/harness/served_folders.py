"""Tiny random folders in sizes that vLLM's layers take, and vLLM's answer to folders"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 16, "topk_group": 1,
}  # fmt: skip
_HYBRID = {
    "hybrid_override_pattern": "M*E-", "num_hidden_layers": 4, "mamba_num_heads": 4,
    "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "conv_kernel": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 64, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {}),
    "gemma3_text": ("Gemma3TextConfig", {}),
    "qwen3_moe": ("Qwen3MoeConfig", _EXPERTS),
    "qwen2_moe": ("Qwen2MoeConfig", {**_EXPERTS, "shared_expert_intermediate_size": 64}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": ("DeepseekV2Config", {**_LATENT, "q_lora_rank": None, "n_group": 1}),
    "deepseek_v3": ("DeepseekV3Config", {**_LATENT, "q_lora_rank": 32, "n_group": 2}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "nemotron_h": ("NemotronHConfig", _HYBRID),
}
_SAID_BY_PUBLISHERS = {
    "deepseek_v3": {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 0,
    }
}
"""Fields that published folders have and transformers' own config class does not write."""


def save_tiny(model_type: str, folder: Path) -> None:
    """A random model of two layers, as ``save_pretrained`` writes it."""
    import transformers

    kind, sizes = CONFIGS[model_type]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**SIZES, **sizes})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
    path = folder / "config.json"
    said = json.loads(path.read_text()) | _SAID_BY_PUBLISHERS.get(model_type, {})
    path.write_text(json.dumps(said))


def keys_of(folder: Path) -> dict[str, list[int]]:
    """Shapes of all tensors in a folder."""
    from safetensors import safe_open

    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    return shapes


def vllm_python() -> str:
    """The Python that has vLLM: ``VLLM_PYTHON``, or this one; the test is skipped without."""
    from importlib.util import find_spec

    if "VLLM_PYTHON" in os.environ:
        return os.environ["VLLM_PYTHON"]
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed; VLLM_PYTHON names a Python that has it")
    return sys.executable


def asked_of_vllm(cases: list[dict]) -> list[dict]:
    """What vLLM's own loaders make of these cases (``served_model.py``)."""
    script = Path(__file__).with_name("served_model.py")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [vllm_python(), str(script)], input=json.dumps(cases), env=environment, text=True,
        capture_output=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
