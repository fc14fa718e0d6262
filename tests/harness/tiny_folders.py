"""Tiny random folders of each architecture that is converted, named as published ones are.

A case is a model type and keys of its configuration besides the sizes that all have. Transformers
writes the names of published folders (an expert's tensors each by itself, ``backbone.`` of
Nemotron-H); what it drops, DeepSeek's multi-token prediction, is put back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SIZES = {
    "vocab_size": 45,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
    **_EXPERTS,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
_V3 = {"q_lora_rank": 12, "n_shared_experts": 1, "n_group": 4, "topk_group": 2} | _LATENT
_V3 |= {"n_routed_experts": 8, "num_experts_per_tok": 4}
_NEMOTRON = {
    "head_dim": 16,
    "n_routed_experts": 4,
    "moe_shared_expert_intermediate_size": 40,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
    "time_step_min": 1e-9,  # transformers cuts shorter steps, Megatron none
    "routed_scaling_factor": 2.5,
    **_EXPERTS,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, scaled": (
        "llama",
        {
            "tie_word_embeddings": True,
            "max_position_embeddings": 16384,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "mistral": ("mistral", {"head_dim": 16, "sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma": ("gemma", {"head_dim": 16}),
    "qwen3_moe": (
        "qwen3_moe",
        {"head_dim": 16, "num_experts": 4, "norm_topk_prob": True, **_EXPERTS},
    ),
    "qwen3_moe, one dense layer": (
        "qwen3_moe",
        {"num_experts": 4, "mlp_only_layers": [0], **_EXPERTS},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {"num_experts": 4, "shared_expert_intermediate_size": 40, **_EXPERTS},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": ("deepseek_v2", {"q_lora_rank": None, "n_shared_experts": 2, **_LATENT}),
    "deepseek_v2, latent queries": (
        "deepseek_v2",
        {
            "q_lora_rank": 12,
            **_LATENT,
            "rope_parameters": {
                **_YARN,
                "mscale": 0.7,
                "mscale_all_dim": 0.7,
                "original_max_position_embeddings": 4096,
            },
        },
    ),
    "deepseek_v3": ("deepseek_v3", {**_V3, "num_nextn_predict_layers": 0}),
    "deepseek_v3, prediction": ("deepseek_v3", {**_V3, "num_nextn_predict_layers": 1}),
    "deepseek_v3, experts alone": (
        "deepseek_v3",
        {**_V3, "first_k_dense_replace": 0, "num_nextn_predict_layers": 2},
    ),
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            **_NEMOTRON,
        },
    ),
    "nemotron_h, latent experts": (
        "nemotron_h",
        {
            "layers_block_type": ["moe", "linear_attention", "full_attention"],
            "moe_latent_size": 20,
            **_NEMOTRON,
        },
    ),
}


def config_of(case: str) -> Any:
    """The configuration of a case."""
    import transformers

    model_type, keys = CASES[case]
    return transformers.AutoConfig.for_model(model_type, **{**SIZES, **keys})


def save_folder(case: str, folder: Path) -> None:
    """Write a random model of a case. Every part of it counts, and nothing is at its beginning."""
    import transformers

    torch.manual_seed(0)
    config = config_of(case)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            noise = torch.randn(tensor.shape)
            matrix = tensor.dim() > 1
            tensor.copy_(noise / tensor.shape[-1] ** 0.5 if matrix else tensor + 0.1 * noise)
    model.save_pretrained(folder)
    depths = getattr(config, "num_nextn_predict_layers", 0)
    if depths:
        weights = folder / "model.safetensors"
        stored = load_file(weights)
        for depth in range(depths):
            stored |= prediction(stored, config.num_hidden_layers, depth)
        save_file(stored, weights, {"format": "pt"})


def prediction(
    stored: Mapping[str, torch.Tensor], layers: int, depth: int
) -> dict[str, torch.Tensor]:
    """Tensors of one depth of multi-token prediction, named as DeepSeek publishes them: a layer
    like the last one, what stands around it, and copies of the embedding and of the head."""
    last, own = f"model.layers.{layers - 1}.", f"model.layers.{layers + depth}."
    hidden = stored["model.norm.weight"].shape[0]
    layer = {
        own + name.removeprefix(last): torch.randn(tensor.shape)
        for name, tensor in stored.items()
        if name.startswith(last)
    }
    around = {
        "enorm.weight": torch.randn(hidden),
        "hnorm.weight": torch.randn(hidden),
        "eh_proj.weight": torch.randn(hidden, 2 * hidden),
        "shared_head.norm.weight": torch.randn(hidden),
        "embed_tokens.weight": stored["model.embed_tokens.weight"].clone(),
        "shared_head.head.weight": stored["lm_head.weight"].clone(),
    }
    return layer | {own + name: tensor for name, tensor in around.items()}
