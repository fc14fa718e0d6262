"""Names of tensors that vLLM reads from a folder, by architecture. Data, read from vLLM's loaders

Read from vLLM 0.33.0, and tried on its own model classes (``served_model.py``). vLLM drops some of
the names that it does not know without a word, and does not notice when one part of a parameter
that it stacks is not there: one expert, one of q, k and v, one of gate and up. Both are answered
here from names alone.

In a pattern ``#`` is a number and ``{a,b}`` is either.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

VLLM = "0.33.0"

_ENDS = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
_NORMS = ("model.layers.#.{input_layernorm,post_attention_layernorm}.weight",)
_FEEDFORWARD_NORMS = ("model.layers.#.{pre,post}_feedforward_layernorm.weight",)
_ATTENTION = ("model.layers.#.self_attn.{q,k,v,o}_proj.weight",)
_ATTENTION_BIAS = ("model.layers.#.self_attn.{q,k,v}_proj.bias",)
_ATTENTION_NORMS = ("model.layers.#.self_attn.{q,k}_norm.weight",)
_MLP = ("model.layers.#.mlp.{gate,up,down}_proj.weight",)
_EXPERTS = (
    "model.layers.#.mlp.gate.weight",
    "model.layers.#.mlp.experts.#.{gate,up,down}_proj.weight",
)
_FUSED_EXPERTS = ("model.layers.#.mlp.experts.{gate_up,down}_proj",)
"""As transformers 5 holds them: [E, 2f, h], the gate first, and [E, h, f]."""
_LATENT = (
    "model.layers.#.self_attn.{q_proj,q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj}.weight",
    "model.layers.#.self_attn.{q_a_layernorm,kv_a_layernorm}.weight",
)
_SHARED_EXPERTS = ("model.layers.#.mlp.shared_experts.{gate,up,down}_proj.weight",)
_DEEPSEEK = (*_ENDS, *_NORMS, *_LATENT, *_MLP, *_EXPERTS, *_SHARED_EXPERTS)
_CODES = (
    "model.layers.#.self_attn.{q_proj,q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj}"
    ".weight_scale_inv",
    "model.layers.#.mlp.{gate,up,down}_proj.weight_scale_inv",
    "model.layers.#.mlp.{experts.#,shared_experts}.{gate,up,down}_proj.weight_scale_inv",
)
"""Scales of a model that was published in FP8 by blocks; its config has ``quantization_config``."""
_NEXT_TOKENS = (
    "model.layers.#.{embed_tokens,enorm,hnorm,eh_proj,shared_head.norm,shared_head.head}.weight",
)
"""What a multi-token-prediction layer has beside a decoder layer; its draft model reads it."""

PATTERNS: dict[str, tuple[str, ...]] = {
    "llama": (*_ENDS, *_NORMS, *_ATTENTION, *_MLP),
    "qwen2": (*_ENDS, *_NORMS, *_ATTENTION, *_ATTENTION_BIAS, *_MLP),
    "qwen3": (*_ENDS, *_NORMS, *_ATTENTION, *_ATTENTION_NORMS, *_MLP),
    "gemma": (*_ENDS, *_NORMS, *_ATTENTION, *_MLP),
    "gemma2": (*_ENDS[:2], *_NORMS, *_FEEDFORWARD_NORMS, *_ATTENTION, *_MLP),
    "gemma3_text": (
        *_ENDS, *_NORMS, *_FEEDFORWARD_NORMS, *_ATTENTION, *_ATTENTION_NORMS, *_MLP,
    ),
    "qwen3_moe": (
        *_ENDS, *_NORMS, *_ATTENTION, *_ATTENTION_NORMS, *_MLP, *_EXPERTS, *_FUSED_EXPERTS,
    ),
    "qwen2_moe": (
        *_ENDS, *_NORMS, *_ATTENTION, *_ATTENTION_BIAS, *_MLP, *_EXPERTS, *_FUSED_EXPERTS,
        "model.layers.#.mlp.shared_expert.{gate,up,down}_proj.weight",
        "model.layers.#.mlp.shared_expert_gate.weight",
    ),
    "olmoe": (
        *_ENDS, *_NORMS, *_ATTENTION, *_ATTENTION_NORMS, *_EXPERTS, *_FUSED_EXPERTS,
    ),
    "mixtral": (
        *_ENDS, *_NORMS, *_ATTENTION,
        "model.layers.#.block_sparse_moe.gate.weight",
        "model.layers.#.block_sparse_moe.experts.#.{w1,w2,w3}.weight",
    ),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": (
        *_DEEPSEEK, *_CODES, *_NEXT_TOKENS,
        "model.layers.#.mlp.gate.e_score_correction_bias",
    ),
    "gpt_oss": (
        *_ENDS, *_NORMS, *_ATTENTION,
        "model.layers.#.self_attn.{q,k,v,o}_proj.bias",
        "model.layers.#.self_attn.sinks",
        "model.layers.#.mlp.router.{weight,bias}",
        "model.layers.#.mlp.experts.{gate_up,down}_proj{,_bias,_blocks,_scales}",
    ),
    "nemotron_h": (
        "backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight",
        "backbone.layers.#.norm.weight",
        "backbone.layers.#.mixer.{q,k,v,o,up,down}_proj.weight",
        "backbone.layers.#.mixer.{A_log,D,dt_bias,conv1d.weight,conv1d.bias}",
        "backbone.layers.#.mixer.{norm,in_proj,out_proj}.weight",
        "backbone.layers.#.mixer.gate.{weight,e_score_correction_bias}",
        "backbone.layers.#.mixer.{experts.#,shared_experts}.{up,down}_proj.weight",
        "mtp.layers.#.{norm,enorm,hnorm,eh_proj,final_layernorm}.weight",
        "mtp.layers.#.mixer.{q,k,v,o}_proj.weight",
        "mtp.layers.#.mixer.gate.{weight,e_score_correction_bias}",
        "mtp.layers.#.mixer.{experts.#,shared_experts}.{up,down}_proj.weight",
    ),
}  # fmt: skip
"""What vLLM reads into the model or its draft model of multi-token prediction."""

_QKV = (("q_proj", "k_proj", "v_proj"),) * 2
_GATED = (("gate_proj", "up_proj"),) * 2
_LOW_RANK = (("q_a_proj", "q_b_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))
STACKS: dict[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    **dict.fromkeys(PATTERNS, (_QKV, _GATED)),
    "deepseek_v2": (_LOW_RANK, _GATED),
    "deepseek_v3": (_LOW_RANK, _GATED),
    "nemotron_h": (_QKV,),
}
"""Where one of the first names is, vLLM holds the second names as one parameter: it asks for any
of them, not for all."""


def unknown_to_vllm(model_type: str, keys: Iterable[str]) -> list[str]:
    """Those of a folder's ``keys`` that vLLM would refuse, or drop without a word.

    Args:
        model_type: As in the folder's ``config.json``.

    Raises:
        KeyError: Nothing is known of that ``model_type``.
    """
    known = _compiled(PATTERNS[model_type])
    return [key for key in keys if not known.fullmatch(key)]


def incomplete_for_vllm(model_type: str, keys: Iterable[str]) -> list[str]:
    """What a folder lacks of parameters that vLLM stacks: it would serve uninitialised memory.

    Experts are counted from 0 to the highest id of any layer. A module that is not there with all
    of its stack is not told: vLLM notices that itself.
    """
    present = set(keys)
    missing: set[str] = set()
    for key in present:
        module, _, kind = key.rpartition(".")
        place, _, name = module.rpartition(".")
        for signs, parts in STACKS[model_type]:
            if name in signs:
                missing |= {f"{place}.{part}.{kind}" for part in parts} - present
    layers: dict[str, set[int]] = defaultdict(set)
    tails = set()
    for key in present:
        if match := _EXPERT.fullmatch(key):
            layers[match["layer"]].add(int(match["expert"]))
            tails.add(match["tail"])
    experts = max((max(ids) for ids in layers.values()), default=-1) + 1
    missing |= {
        f"{layer}.{expert}.{tail}"
        for layer in layers
        for expert in range(experts)
        for tail in tails
    } - present
    return sorted(missing)


_EXPERT = re.compile(r"(?P<layer>.+\.experts)\.(?P<expert>\d+)\.(?P<tail>.+)")


def _compiled(patterns: Iterable[str]) -> re.Pattern[str]:
    texts = []
    for pattern in patterns:
        text = re.escape(pattern).replace(r"\#", r"\d+")
        texts.append(
            re.sub(r"\\\{(.*?)\\\}", lambda found: "(?:" + found[1].replace(",", "|") + ")", text)
        )
    return re.compile("|".join(texts))
