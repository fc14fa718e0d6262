"""Tiny models of published architectures: from ``transformers``, and the same one in Megatron.

    model = ARCHITECTURES["deepseek_v3"]
    model.make(folder)          # its weights under Megatron's names, and the logits to expect
    model.flags                 # Megatron's, its sizes with them

Each has what its architecture has and small sizes, and random weights, norms and biases included.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VOCAB = 61
SEQUENCE = 32
LAYERS = "decoder.layers"


class Weights:
    """Tensors of a Hugging Face folder on their way to Megatron's names.

    Attributes:
        stored: by their names in the files; each is taken away as it is used.
        named: by Megatron's.
    """

    def __init__(self, stored: dict[str, torch.Tensor]) -> None:
        self.stored = stored
        self.named: dict[str, torch.Tensor] = {}

    def copy(self, megatron: str, *names: str) -> None:
        """One tensor, or several joined by their rows."""
        self.named[megatron] = torch.cat([self.stored.pop(name) for name in names])

    def mlp(self, megatron: str, name: str, gate="gate_proj", up="up_proj", down="down_proj"):
        """A gated MLP, the gate in front of what it gates."""
        self.copy(f"{megatron}.linear_fc1.weight", f"{name}.{gate}.weight", f"{name}.{up}.weight")
        self.copy(f"{megatron}.linear_fc2.weight", f"{name}.{down}.weight")

    def qkv(self, megatron: str, name: str, groups: int, kind: str = "weight") -> None:
        """Queries, keys and values of each key group together."""
        parts = [self.stored.pop(f"{name}.{x}_proj.{kind}") for x in "qkv"]
        by_group = [part.view(groups, -1, *part.shape[1:]) for part in parts]
        self.named[f"{megatron}.linear_qkv.{kind}"] = torch.cat(by_group, 1).flatten(0, 1)

    def ends(self) -> None:
        """Embedding, last norm, head."""
        self.copy("embedding.word_embeddings.weight", "model.embed_tokens.weight")
        self.copy("decoder.final_layernorm.weight", "model.norm.weight")
        if "lm_head.weight" in self.stored:
            self.copy("output_layer.weight", "lm_head.weight")


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


def deepseek_layer(
    w: Weights, megatron: str, name: str, c: Any, dense: bool, experts: str = "experts"
) -> None:
    """Latent attention, then an MLP or experts with shared ones; no rotary permutation."""
    w.copy(f"{megatron}.input_layernorm.weight", f"{name}.input_layernorm.weight")
    w.copy(f"{megatron}.pre_mlp_layernorm.weight", f"{name}.post_attention_layernorm.weight")
    ours, theirs = f"{megatron}.self_attention", f"{name}.self_attn"
    pairs = {
        "linear_kv_down_proj": "kv_a_proj_with_mqa",
        "kv_layernorm": "kv_a_layernorm",
        "linear_kv_up_proj": "kv_b_proj",
        "linear_proj": "o_proj",
    }
    if c.q_lora_rank is None:
        pairs["linear_q_proj"] = "q_proj"
    else:
        pairs |= {"linear_q_down_proj": "q_a_proj", "q_layernorm": "q_a_layernorm"}
        pairs["linear_q_up_proj"] = "q_b_proj"
    for ours_is, theirs_is in pairs.items():
        w.copy(f"{ours}.{ours_is}.weight", f"{theirs}.{theirs_is}.weight")
    if dense:
        w.mlp(f"{megatron}.mlp", f"{name}.mlp")
        return
    w.copy(f"{megatron}.mlp.router.weight", f"{name}.mlp.gate.weight")
    if f"{name}.mlp.gate.e_score_correction_bias" in w.stored:
        bias = f"{name}.mlp.gate.e_score_correction_bias"
        w.copy(f"{megatron}.mlp.router.expert_bias", bias)
    for expert in range(c.n_routed_experts):
        w.mlp(f"{megatron}.mlp.{experts}.{expert}", f"{name}.mlp.experts.{expert}")
    w.mlp(f"{megatron}.mlp.shared_experts", f"{name}.mlp.shared_experts")


def deepseek(w: Weights, c: Any) -> None:
    """All of a DeepSeek model; layers of multi-token prediction stand behind the others."""
    w.ends()
    for layer in range(c.num_hidden_layers):
        dense = layer < c.first_k_dense_replace
        deepseek_layer(w, f"{LAYERS}.{layer}", f"model.layers.{layer}", c, dense)
    for depth in range(getattr(c, "num_nextn_predict_layers", 0)):
        ours, theirs = f"mtp.layers.{depth}", f"model.layers.{c.num_hidden_layers + depth}"
        for name in ("enorm", "hnorm", "eh_proj"):
            w.copy(f"{ours}.{name}.weight", f"{theirs}.{name}.weight")
        w.copy(f"{ours}.final_layernorm.weight", f"{theirs}.shared_head.norm.weight")
        for name, same in (("embed_tokens", "embedding.word_embeddings"), ("shared_head.head", "")):
            copied = w.stored.pop(f"{theirs}.{name}.weight")
            assert torch.equal(copied, w.named[f"{same or 'output_layer'}.weight"])
        layer, experts = f"{ours}.mtp_model_layer", "experts.local_experts"
        deepseek_layer(w, layer, theirs, c, dense=False, experts=experts)


def deepseek_hybrid(w: Weights, c: Any) -> None:
    """The same as a hybrid model: two layers for each, attention and what follows it."""
    deepseek(w, c)
    halves = {}
    for name, tensor in w.named.items():
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
        if match is not None:
            second = not match[2].startswith(("input_layernorm", "self_attention"))
            name = f"{LAYERS}.{2 * int(match[1]) + second}.{match[2]}"
        halves[name.replace("decoder.final_layernorm", "decoder.final_norm")] = tensor
    w.named = halves


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


def gpt_oss(w: Weights, c: Any) -> None:
    """Sinks, biases everywhere, and experts that the files hold together."""
    w.ends()
    for layer in range(c.num_hidden_layers):
        ours, theirs = f"{LAYERS}.{layer}", f"model.layers.{layer}"
        w.copy(f"{ours}.input_layernorm.weight", f"{theirs}.input_layernorm.weight")
        w.copy(f"{ours}.pre_mlp_layernorm.weight", f"{theirs}.post_attention_layernorm.weight")
        attention = f"{ours}.self_attention"
        for kind in ("weight", "bias"):
            w.qkv(attention, f"{theirs}.self_attn", c.num_key_value_heads, kind)
            w.copy(f"{attention}.linear_proj.{kind}", f"{theirs}.self_attn.o_proj.{kind}")
            w.copy(f"{ours}.mlp.router.{kind}", f"{theirs}.mlp.router.{kind}")
        w.copy(f"{attention}.core_attention.softmax_offset", f"{theirs}.self_attn.sinks")
        for name, kind in (("", "weight"), ("_bias", "bias")):
            up = w.stored.pop(f"{theirs}.mlp.experts.gate_up_proj{name}")  # in turns: gate, up
            down = w.stored.pop(f"{theirs}.mlp.experts.down_proj{name}")
            for expert in range(c.num_local_experts):
                own = torch.cat([up[expert][..., 0::2], up[expert][..., 1::2]], -1)
                fc1, fc2 = (f"{ours}.mlp.experts.{expert}.linear_fc{n}.{kind}" for n in (1, 2))
                w.named[fc1], w.named[fc2] = own.T, down[expert].T


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


def nemotron_h(w: Weights, c: Any) -> None:
    """One layer of the pattern for each of the files, under one norm; experts are not gated."""
    w.copy("embedding.word_embeddings.weight", "backbone.embeddings.weight")
    w.copy("decoder.final_norm.weight", "backbone.norm_f.weight")
    w.copy("output_layer.weight", "lm_head.weight")
    for layer, kind in enumerate(c.layers_block_type):
        ours, theirs = f"{LAYERS}.{layer}", f"backbone.layers.{layer}"
        norm = {"linear_attention": "norm", "full_attention": "input_layernorm"}.get(kind)
        w.copy(f"{ours}.{norm or 'pre_mlp_layernorm'}.weight", f"{theirs}.norm.weight")
        theirs += ".mixer"
        if kind == "linear_attention":
            for name in ("in_proj.weight", "out_proj.weight", "norm.weight", "A_log", "D"):
                w.copy(f"{ours}.mixer.{name}", f"{theirs}.{name}")
            w.copy(f"{ours}.mixer.dt_bias", f"{theirs}.dt_bias")
            for name in ("weight", "bias"):
                w.copy(f"{ours}.mixer.conv1d.{name}", f"{theirs}.conv1d.{name}")
        elif kind == "full_attention":
            w.qkv(f"{ours}.self_attention", theirs, c.num_key_value_heads)
            w.copy(f"{ours}.self_attention.linear_proj.weight", f"{theirs}.o_proj.weight")
        else:
            parts = [""]
            if kind == "moe":
                router = f"{ours}.mlp.router"
                w.copy(f"{router}.weight", f"{theirs}.gate.weight")
                w.copy(f"{router}.expert_bias", f"{theirs}.gate.e_score_correction_bias")
                parts = [f".experts.{n}" for n in range(c.n_routed_experts)]
                parts.append(".shared_experts")
            for part in parts:
                w.copy(f"{ours}.mlp{part}.linear_fc1.weight", f"{theirs}{part}.up_proj.weight")
                w.copy(f"{ours}.mlp{part}.linear_fc2.weight", f"{theirs}{part}.down_proj.weight")


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


def gpt(w: Weights, c: Any) -> None:
    """A decoder as most are; of what it has not, the folder has no tensor."""
    w.ends()
    for layer in range(c.num_hidden_layers):
        ours, theirs = f"{LAYERS}.{layer}", f"model.layers.{layer}"
        attention = f"{ours}.self_attention"
        w.copy(f"{ours}.input_layernorm.weight", f"{theirs}.input_layernorm.weight")
        w.copy(f"{ours}.pre_mlp_layernorm.weight", f"{theirs}.post_attention_layernorm.weight")
        w.copy(f"{attention}.linear_proj.weight", f"{theirs}.self_attn.o_proj.weight")
        for kind in ("weight", "bias"):
            if f"{theirs}.self_attn.q_proj.{kind}" in w.stored:
                w.qkv(attention, f"{theirs}.self_attn", c.num_key_value_heads, kind)
        for x in "qk":
            if f"{theirs}.self_attn.{x}_norm.weight" in w.stored:
                w.copy(f"{attention}.{x}_layernorm.weight", f"{theirs}.self_attn.{x}_norm.weight")
        if f"{theirs}.mlp.gate_proj.weight" in w.stored:
            w.mlp(f"{ours}.mlp", f"{theirs}.mlp")
            continue
        moe = f"{theirs}.mlp"
        names = ("gate_proj", "up_proj", "down_proj")
        if f"{theirs}.block_sparse_moe.gate.weight" in w.stored:  # Mixtral
            moe, names = f"{theirs}.block_sparse_moe", ("w1", "w3", "w2")
        w.copy(f"{ours}.mlp.router.weight", f"{moe}.gate.weight")
        for expert in range(len(w.named[f"{ours}.mlp.router.weight"])):
            w.mlp(f"{ours}.mlp.experts.{expert}", f"{moe}.experts.{expert}", *names)
        if f"{moe}.shared_expert_gate.weight" in w.stored:
            w.copy(f"{ours}.mlp.shared_experts.gate_weight", f"{moe}.shared_expert_gate.weight")
            w.mlp(f"{ours}.mlp.shared_experts", f"{moe}.shared_expert")


def gemma(w: Weights, c: Any) -> None:
    """As most are, but that the head is the embedding before it is scaled."""
    w.stored["lm_head.weight"] = w.stored["model.embed_tokens.weight"].clone()
    w.stored["model.embed_tokens.weight"] *= c.hidden_size**0.5
    gpt(w, c)


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
