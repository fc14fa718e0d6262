"""DeepSeek-V2 and -V3: multi-latent attention, shared experts, dense layers first.

V3 chooses experts by sigmoids with a bias and in groups, and publishes multi-token prediction as
layers behind the last one, each with copies of the embedding and of the head. Transformers drops
these layers and leaves their number in ``config.json``.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Container, Iterator
from typing import Any

from megatron_moe_inject.convert.architectures.configuration import Keys, key_names, key_of
from megatron_moe_inject.convert.architectures.decoder import ONLY, READ, ExpertDecoder
from megatron_moe_inject.convert.architectures.parts import (
    Block,
    Latents,
    gated,
    latent_attention,
    mlp_norm,
)
from megatron_moe_inject.convert.architectures.rotary import latent_rope_flags
from megatron_moe_inject.convert.architectures.routers import sigmoid_router_flags
from megatron_moe_inject.convert.architectures.table import Entry
from megatron_moe_inject.host.errors import fail

_READ = (READ - {"rms_norm_eps"}) | key_names(
    "moe_intermediate_size n_routed_experts n_shared_experts num_experts_per_tok "
    "first_k_dense_replace routed_scaling_factor kv_lora_rank q_lora_rank qk_nope_head_dim "
    "qk_rope_head_dim qk_head_dim v_head_dim n_group topk_group ep_size"
)

_ONLY = {
    **ONLY,
    "attention_bias": (False,),
    "rms_norm_eps": (1e-6,),  # the latents' norms have it whatever the configuration says
    "moe_layer_freq": (1,),
}


PLAIN_QUERIES = ("megatron_moe_inject.host.plain_queries", "layers")
"""Layers for models without a latent of queries, of which Megatron norms the input twice."""


class DeepSeek(ExpertDecoder):
    """What both have."""

    attention_symbol = "+"
    experts_key = "n_routed_experts"

    def layouts(self, config: Any) -> tuple[str, ...]:
        return ("gpt",) if config.q_lora_rank is None else super().layouts(config)

    def check(self, config: Any) -> None:
        super().check(config)
        if not config.n_shared_experts:
            remedy = "served: one or more"
            raise fail(key_of("n_shared_experts"), config.n_shared_experts, "is not served", remedy)

    def expert_layer(self, config: Any, layer: int) -> bool:
        return layer >= config.first_k_dense_replace

    def attention_flags(self, config: Any) -> dict[str, Any]:
        sizes = Latents.of(config)
        flags: dict[str, Any] = {
            "--num-attention-heads": sizes.heads,
            "--multi-latent-attention": True,
            "--qk-layernorm": True,
            "--kv-lora-rank": sizes.rank,
            "--qk-head-dim": sizes.plain,
            "--qk-pos-emb-head-dim": sizes.rotated,
            "--v-head-dim": sizes.value,
            "--kv-channels": sizes.value,
        }
        if sizes.query_rank is None:
            flags["--spec"] = PLAIN_QUERIES
        else:
            flags["--q-lora-rank"] = sizes.query_rank
        return flags

    def position_flags(self, config: Any) -> dict[str, Any]:
        return latent_rope_flags(config)

    def router_flags(self, config: Any) -> dict[str, Any]:
        return self.choice_flags(config) | {
            "--moe-shared-expert-intermediate-size": self.shared_width(config)
        }

    @abstractmethod
    def choice_flags(self, config: Any) -> dict[str, Any]:
        """Options of how experts are chosen."""
        ...

    def shared_width(self, config: Any) -> int:
        """Width of the shared experts, which are one feed-forward."""
        return config.n_shared_experts * config.moe_intermediate_size

    def attention(self, config: Any, block: Block) -> Iterator[Entry]:
        yield from latent_attention(block, Latents.of(config))

    def expert_entries(self, config: Any, block: Block) -> Iterator[Entry]:
        yield from super().expert_entries(config, block)
        name = "mlp.shared_experts."
        width = self.shared_width(config)
        yield from gated(block, config.hidden_size, width, name=name, within=name)


class DeepSeekV2(DeepSeek):
    """DeepSeek-V2-Lite, which chooses experts by their softmax alone (``greedy``)."""

    model_types = ("deepseek_v2",)
    keys = Keys(
        _READ | {"topk_method"},
        {**_ONLY, "mlp_bias": (False,), "norm_topk_prob": (False,), "scoring_func": ("softmax",)},
    )

    def choice_flags(self, config: Any) -> dict[str, Any]:
        flags = {
            "--moe-router-pre-softmax": True,
            "--moe-router-topk-scaling-factor": float(config.routed_scaling_factor),
            "--moe-router-dtype": "fp32",
        }
        if config.topk_method == "group_limited_greedy":
            chosen = config.topk_group
            if config.num_experts_per_tok // chosen != 1:
                problem = f"is not served with num_experts_per_tok = {config.num_experts_per_tok}"
                remedy = (
                    "Megatron scores a group by its best k / topk_group experts, the model by one"
                )
                raise fail(key_of("topk_group"), chosen, problem, remedy)
            flags |= {
                "--moe-router-num-groups": config.n_group,
                "--moe-router-group-topk": chosen,
            }
        elif config.topk_method != "greedy":
            remedy = "served: greedy, group_limited_greedy"
            raise fail(key_of("topk_method"), config.topk_method, "is not served", remedy)
        return flags


class DeepSeekV3(DeepSeek):
    """DeepSeek-V3 and -R1, and what calls itself so."""

    model_types = ("deepseek_v3",)
    keys = Keys(
        _READ | {"num_nextn_predict_layers", "norm_topk_prob"},
        {
            **_ONLY,
            "rope_interleave": (True,),
            "scoring_func": ("sigmoid",),
            "topk_method": ("noaux_tc",),
        },
    )

    def for_folder(self, config: Any, names: Container[str]) -> Any:
        last = config.num_hidden_layers
        if f"model.layers.{last}.eh_proj.weight" in names or not config.num_nextn_predict_layers:
            return config
        without = copy.deepcopy(config)
        without.num_nextn_predict_layers = 0
        return without

    def flags(self, config: Any) -> dict[str, Any]:
        flags = super().flags(config)
        if config.num_nextn_predict_layers:
            flags["--mtp-num-layers"] = config.num_nextn_predict_layers
        return flags

    def choice_flags(self, config: Any) -> dict[str, Any]:
        return sigmoid_router_flags(config)

    def expert_entries(self, config: Any, block: Block) -> Iterator[Entry]:
        yield from super().expert_entries(config, block)
        part, size = "mlp.gate.e_score_correction_bias", (config.n_routed_experts,)
        yield block.entry("mlp.router.expert_bias", part, size, dtype="float32")

    def entries(self, config: Any) -> Iterator[Entry]:
        yield from super().entries(config)
        for depth in range(config.num_nextn_predict_layers):
            yield from self._prediction(config, depth)

    def _prediction(self, config: Any, depth: int) -> Iterator[Entry]:
        """One depth of multi-token prediction: norms, their projection, and a layer."""
        folder = f"model.layers.{config.num_hidden_layers + depth}."
        h = config.hidden_size
        outer = Block(folder, prefix=f"mtp.layers.{depth}.")
        yield outer.entry("enorm.weight", "enorm.weight", (h,))
        yield outer.entry("hnorm.weight", "hnorm.weight", (h,))
        yield outer.entry("eh_proj.weight", "eh_proj.weight", (h, 2 * h))
        inner = Block(folder, prefix=f"{outer.prefix}transformer_layer.")
        yield from self.attention(config, inner)
        yield mlp_norm(inner, h)
        yield from self.expert_entries(config, inner)
        yield outer.entry("final_layernorm.weight", "shared_head.norm.weight", (h,))

    def copies(self, config: Any) -> dict[str, str]:
        copies = super().copies(config)
        embedding = "model.embed_tokens.weight"
        head = embedding if config.tie_word_embeddings else "lm_head.weight"
        for depth in range(config.num_nextn_predict_layers):
            folder = f"model.layers.{config.num_hidden_layers + depth}."
            copies[f"{folder}embed_tokens.weight"] = embedding
            copies[f"{folder}shared_head.head.weight"] = head
        return copies

    def layer_pattern(self, config: Any) -> str:
        return super().layer_pattern(config) + "/+E" * config.num_nextn_predict_layers
