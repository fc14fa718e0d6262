"""Weights of a Hugging Face folder under Megatron's names, by architecture."""

from __future__ import annotations

import re
from typing import Any

import torch

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
