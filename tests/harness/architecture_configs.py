"""Configurations of ``transformers`` for tiny models of published architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

VOCAB = 61


def yarn(**numbers: float) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 4096,
        "factor": 40,
        **numbers,
    }


def deepseek_sizes(**own: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 4,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "max_position_embeddings": 4096 * 40,
        **own,
    }


def deepseek_v2_lite():
    import transformers

    return transformers.DeepseekV2Config(
        **deepseek_sizes(q_lora_rank=None, n_shared_experts=2, topk_method="greedy"),
        norm_topk_prob=False,
        rope_parameters=yarn(mscale=0.707, mscale_all_dim=0.707),
    )


def deepseek_v3(prediction: int = 1):
    import transformers

    return transformers.DeepseekV3Config(
        **deepseek_sizes(q_lora_rank=24, n_shared_experts=1, n_group=4, topk_group=2),
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=prediction,
        rope_parameters=yarn(mscale=1.0, mscale_all_dim=1.0),
    )


def gpt_oss_20b():
    import transformers

    return transformers.GptOssConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=4,
        num_local_experts=8,
        num_experts_per_tok=4,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        swiglu_limit=1.0,
    )


def nemotron3_nano():
    import transformers

    return transformers.NemotronHConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        hybrid_override_pattern="MEM*E-ME",
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=48,
        mamba_num_heads=16,
        mamba_head_dim=8,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=8,
        n_routed_experts=8,
        num_experts_per_tok=4,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=40,
        routed_scaling_factor=2.5,
        n_group=4,
        topk_group=2,
        time_step_min=1e-9,  # transformers lets no step be shorter, Megatron any
    )


def of(name: str, **own: Any) -> Callable[[], Any]:
    """A configuration of ``transformers`` by its class, with small sizes that ``own`` changes."""

    def config() -> Any:
        import transformers

        sizes = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
        }
        return getattr(transformers, name)(**sizes | own)

    return config
