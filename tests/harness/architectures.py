"""Tiny models of published architectures: from ``transformers``, and the same one in Megatron.

    model = ARCHITECTURES["deepseek_v3"]
    model.make(folder)          # its weights under Megatron's names, and the logits to expect
    model.flags                 # Megatron's, its sizes with them

Each has what its architecture has and small sizes, and random weights, norms and biases included.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.harness.architecture_configs import (
    VOCAB,
    deepseek_v2_lite,
    deepseek_v3,
    gpt_oss_20b,
    nemotron3_nano,
    of,
)
from tests.harness.architecture_weights import (
    Weights,
    deepseek,
    deepseek_hybrid,
    gemma,
    gpt,
    gpt_oss,
    nemotron_h,
)

SEQUENCE = 32


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        config: of ``transformers``.
        flags: of Megatron, for the model.
        weights: moves all tensors of a folder.
        tolerance: largest difference of logits.
    """

    config: Callable[[], Any]
    flags: tuple[str, ...]
    weights: Callable[[Weights, Any], None]
    tolerance: float = 1e-5

    def make(self, folder: Path) -> None:
        """Write ``hf`` (model), ``weights.safetensors``, ``tokens.pt`` and ``logits.pt``."""
        import transformers

        torch.manual_seed(0)
        config = self.config()
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        model.set_attn_implementation("eager")
        stirred(model)
        model.save_pretrained(folder / "hf")
        stored = load_file(folder / "hf" / "model.safetensors")
        tokens = torch.randint(VOCAB, (2, SEQUENCE))
        with torch.no_grad():
            states = model.model(tokens).last_hidden_state
            logits = [model(tokens).logits]
        depth = getattr(config, "num_nextn_predict_layers", None)
        if depth:
            stored |= with_prediction(model, depth, tokens, states, logits)
            save_file(stored, folder / "hf" / "model.safetensors", {"format": "pt"})
        torch.save(tokens, folder / "tokens.pt")
        torch.save(logits, folder / "logits.pt")
        moved = Weights(stored)
        self.weights(moved, config)
        assert not moved.stored, sorted(moved.stored)
        named = {name: tensor.contiguous().clone() for name, tensor in moved.named.items()}
        save_file(named, folder / "weights.safetensors")


def stirred(model: torch.nn.Module) -> None:
    """Weights wide enough for every part to count, and nothing at its beginning."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("inv_freq", "embed_scale")):
                continue
            spread = 0.7 / math.sqrt(tensor.shape[-1]) if tensor.dim() > 1 else 0.1
            noise = spread * torch.randn_like(tensor)
            tensor.copy_(tensor + noise if tensor.dim() == 1 else noise)


def with_prediction(model, depth, tokens, states, logits) -> dict[str, torch.Tensor]:
    """Layers of multi-token prediction, by their names in files; their logits go to ``logits``."""
    from transformers.modeling_layers import MtpModel

    behind = MtpModel(model, depth).eval()
    stirred(behind.layers)
    positions, stored = torch.arange(SEQUENCE)[None], {}
    for number, layer in enumerate(behind.layers):
        # Each looks one token further ahead; behind the end is token 0, as in Megatron.
        tokens = torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], 1)
        embedded = model.get_input_embeddings()(tokens)
        rotary = model.model.rotary_emb(embedded, positions)
        hidden = torch.full((SEQUENCE, SEQUENCE), -math.inf).triu(1)[None, None]
        with torch.no_grad():
            states = layer(embedded, states, rotary, hidden, positions, None)
            logits.append(model.lm_head(states))
        prefix = f"model.layers.{model.config.num_hidden_layers + number}."
        for name, tensor in layer.state_dict().items():
            name = name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
            stored |= split_experts(prefix + name, tensor)
        stored[f"{prefix}embed_tokens.weight"] = model.get_input_embeddings().weight.detach()
        stored[f"{prefix}shared_head.head.weight"] = model.lm_head.weight.detach()
    return {name: tensor.detach().contiguous().clone() for name, tensor in stored.items()}


def split_experts(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor of all experts as the files have it: one of each."""
    before, found, kind = name.partition("mlp.experts.")
    if not found:
        return {name: tensor}
    parts = {}
    for expert, own in enumerate(tensor):
        halves = own.chunk(2) if kind == "gate_up_proj" else [own]
        kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        for one, half in zip(kinds, halves, strict=True):
            parts[f"{before}mlp.experts.{expert}.{one}.weight"] = half
    return parts


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


LATENT = words(
    "--hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 "
    "--seq-length 32 --max-position-embeddings 163840 --normalization RMSNorm --norm-epsilon 1e-6 "
    "--swiglu --disable-bias-linear --untie-embeddings-and-output-weights "
    "--multi-latent-attention --qk-layernorm --kv-lora-rank 16 --qk-head-dim 16 "
    "--qk-pos-emb-head-dim 8 --v-head-dim 12 --kv-channels 12 --position-embedding-type rope "
    "--rope-type yarn --rotary-base 10000 --rotary-scaling-factor 40 "
    "--num-experts 8 --moe-router-topk 4 --moe-ffn-hidden-size 16 "
    "--moe-router-pre-softmax --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall "
    "--moe-router-load-balancing-type seq_aux_loss"
)
IN_BLOCKS = words("--num-layers 4 --moe-layer-freq [0,1,1,1]")
LATENT_V3 = words(
    "--mscale 1.0 --mscale-all-dim 1.0 --moe-shared-expert-intermediate-size 16 "
    "--q-lora-rank 24 --moe-router-score-function sigmoid "
    "--moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-3 "
    "--moe-router-num-groups 4 --moe-router-group-topk 2 "
    "--moe-router-topk-scaling-factor 2.5 --moe-aux-loss-coeff 1e-4"
)
PLAIN = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 "
    "--group-query-attention --num-query-groups 2 --seq-length 32 --normalization RMSNorm "
    "--disable-bias-linear --swiglu --position-embedding-type rope "
)
EXPERTS = (
    "--num-experts 8 --moe-router-topk 4 --moe-ffn-hidden-size 16 "
    "--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 1e-3 "
)
ARCHITECTURES = {
    "deepseek_v2_lite": Architecture(
        deepseek_v2_lite,
        (
            *(*LATENT, *IN_BLOCKS),
            *words(
                "--spec megatron_moe_inject.host.plain_queries layers "
                "--mscale 0.707 --mscale-all-dim 0.707 --moe-shared-expert-intermediate-size 32 "
                "--moe-aux-loss-coeff 0.001"
            ),
        ),
        deepseek,
    ),
    "deepseek_v3": Architecture(
        deepseek_v3,
        (
            *(*LATENT, *IN_BLOCKS, *LATENT_V3),
            *words("--mtp-num-layers 1 --mtp-loss-scaling-factor 0.1"),
        ),
        deepseek,
    ),
    "deepseek_v3_hybrid": Architecture(
        functools.partial(deepseek_v3, prediction=0),
        (*LATENT, *LATENT_V3, "--hybrid-layer-pattern", "+-+E+E+E"),
        deepseek_hybrid,
    ),
    "gpt_oss_20b": Architecture(
        gpt_oss_20b,
        words(
            "--num-layers 4 --hidden-size 32 --ffn-hidden-size 24 --num-attention-heads 4 "
            "--group-query-attention --num-query-groups 2 --kv-channels 16 "
            "--seq-length 32 --max-position-embeddings 131072 --normalization RMSNorm "
            "--norm-epsilon 1e-5 --untie-embeddings-and-output-weights "
            "--add-qkv-bias --quick-geglu --glu-linear-offset 1.0 --no-bias-gelu-fusion "
            "--activation-func-clamp-value 1.0 "
            "--softmax-type learnable --window-size 7,0 --window-attn-skip-freq 2 "
            "--position-embedding-type yarn --rotary-base 150000 --rotary-scaling-factor 32 "
            "--yarn-original-max-position-embeddings 4096 --yarn-beta-fast 32 --yarn-beta-slow 1 "
            "--no-yarn-correction-range-round-to-int "
            "--num-experts 8 --moe-router-topk 4 --moe-ffn-hidden-size 24 "
            "--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type none"
        ),
        gpt_oss,
    ),
    "nemotron3_nano": Architecture(
        nemotron3_nano,
        words(
            "--hybrid-layer-pattern MEM*E-ME --hidden-size 32 --ffn-hidden-size 48 "
            "--num-attention-heads 4 --group-query-attention --num-query-groups 2 --kv-channels 16 "
            "--seq-length 32 --max-position-embeddings 262144 --normalization RMSNorm "
            "--norm-epsilon 1e-5 --disable-bias-linear --untie-embeddings-and-output-weights "
            "--squared-relu --position-embedding-type none --mamba-num-heads 16 "
            "--mamba-head-dim 8 --mamba-state-dim 16 --mamba-num-groups 2 "
            "--num-experts 8 --moe-router-topk 4 --moe-ffn-hidden-size 24 "
            "--moe-shared-expert-intermediate-size 40 --moe-router-score-function sigmoid "
            "--moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-3 "
            "--moe-router-num-groups 4 --moe-router-group-topk 2 "
            "--moe-router-topk-scaling-factor 2.5 --moe-router-dtype fp32 "
            "--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type seq_aux_loss "
            "--moe-aux-loss-coeff 1e-4"
        ),
        nemotron_h,
    ),
    "qwen2_moe": Architecture(
        of(
            "Qwen2MoeConfig",
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
            num_experts=8,
            num_experts_per_tok=4,
            norm_topk_prob=False,
            qkv_bias=True,
        ),
        words(
            f"{PLAIN} {EXPERTS} --norm-epsilon 1e-6 --untie-embeddings-and-output-weights "
            "--max-position-embeddings 32768 --rotary-base 10000 --add-qkv-bias "
            "--moe-shared-expert-intermediate-size 24 --moe-shared-expert-gate "
            "--moe-router-pre-softmax"
        ),
        gpt,
    ),
    "qwen3_moe": Architecture(
        of(
            "Qwen3MoeConfig",
            moe_intermediate_size=16,
            num_experts=8,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            head_dim=16,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        words(
            f"{PLAIN} {EXPERTS} --norm-epsilon 1e-6 --untie-embeddings-and-output-weights "
            "--max-position-embeddings 40960 --rotary-base 1000000 --kv-channels 16 --qk-layernorm"
        ),
        gpt,
    ),
    "mixtral": Architecture(
        of(
            "MixtralConfig",
            intermediate_size=16,
            num_local_experts=8,
            num_experts_per_tok=4,
            sliding_window=None,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        words(
            f"{PLAIN} {EXPERTS} --norm-epsilon 1e-5 --untie-embeddings-and-output-weights "
            "--max-position-embeddings 32768 --rotary-base 1000000"
        ),
        gpt,
    ),
    "olmoe": Architecture(
        of(
            "OlmoeConfig",
            intermediate_size=16,
            num_experts=8,
            num_experts_per_tok=4,
            norm_topk_prob=False,
            num_key_value_heads=4,
        ),
        words(
            f"{PLAIN} {EXPERTS} --norm-epsilon 1e-5 --untie-embeddings-and-output-weights "
            "--max-position-embeddings 4096 --rotary-base 10000 --num-query-groups 4 "
            "--moe-router-pre-softmax --qk-layernorm "
            "--spec megatron_moe_inject.host.projection_norms layers"
        ),
        gpt,
    ),
    "qwen3": Architecture(
        of(
            "Qwen3Config",
            head_dim=16,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        words(
            f"{PLAIN} --norm-epsilon 1e-6 --max-position-embeddings 40960 --rotary-base 1000000 "
            "--kv-channels 16 --qk-layernorm"
        ),
        gpt,
    ),
    "llama3": Architecture(
        of(
            "LlamaConfig",
            max_position_embeddings=131072,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            head_dim=64,
        ),
        words(
            f"{PLAIN} --norm-epsilon 1e-6 --untie-embeddings-and-output-weights "
            "--max-position-embeddings 131072 --rotary-base 500 --use-rope-scaling "
            "--kv-channels 64"
        ),
        gpt,
    ),
    "gemma": Architecture(
        of(
            "GemmaConfig",
            head_dim=16,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
        ),
        words(
            f"{PLAIN} --norm-epsilon 1e-6 --apply-layernorm-1p --num-query-groups 1 "
            "--untie-embeddings-and-output-weights --max-position-embeddings 8192 "
            "--rotary-base 10000 --kv-channels 16 --spec megatron_moe_inject.host.gelu_gates layers"
        ),
        gemma,
    ),
}
