"""Nemotron-H: layers of Mamba, attention, experts or a dense feed-forward, without positions.

Each layer is one of a hybrid model's. Feed-forwards are not gated, their activation is the squared
ReLU. Checkpoints store the rows of a Mamba layer's projection and convolution in pieces: z gate,
x input, B and C of the state, dt time step.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator
from typing import Any

from megatron_moe_inject.convert.architectures.configuration import Keys, key_names
from megatron_moe_inject.convert.architectures.parts import Block, Heads, attention, outside
from megatron_moe_inject.convert.architectures.routers import sigmoid_router_flags
from megatron_moe_inject.convert.architectures.table import Architecture, Entry

_SYMBOLS = {"linear_attention": "M", "full_attention": "*", "moe": "E", "mlp": "-"}


class NemotronH(Architecture):
    """Nemotron-H and Nemotron 3 Nano, without multi-token prediction."""

    model_types = ("nemotron_h",)
    experts_key = "n_routed_experts"
    keys = Keys(
        key_names(
            "vocab_size hidden_size intermediate_size layers_block_type num_attention_heads "
            "num_key_value_heads head_dim max_position_embeddings layer_norm_epsilon "
            "attention_dropout hidden_dropout ssm_state_size mamba_num_heads "
            "mamba_head_dim n_groups n_routed_experts num_experts_per_tok moe_intermediate_size "
            "moe_shared_expert_intermediate_size moe_latent_size routed_scaling_factor n_group "
            "topk_group norm_topk_prob expand "
            # of multi-token prediction, of training, and what only transformers' code reads
            "mtp_layers_block_type rescale_prenorm_residual moe_shared_expert_overlap "
            "num_logits_to_keep use_mamba_kernels mamba_ssm_cache_dtype norm_eps "
            # the model has no positions
            "rope_theta partial_rotary_factor "
            # how time steps begin; transformers also cuts them below time_step_min, which neither
            # Megatron nor its training did
            "time_step_min time_step_max time_step_floor time_step_limit"
        ),
        {
            "is_encoder_decoder": (False,),
            "tie_word_embeddings": (False,),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "use_bias": (False,),
            "mamba_proj_bias": (False,),
            "use_conv_bias": (True,),
            "mamba_hidden_act": ("silu", "swish"),
            "mlp_hidden_act": ("relu2",),
            "sliding_window": (None,),
            "residual_in_fp32": (False,),
            "n_shared_experts": (1,),
            "num_nextn_predict_layers": (0,),
            "conv_kernel": (4,),
            "chunk_size": (128,),
        },
    )

    def layouts(self, config: Any) -> tuple[str, ...]:
        return ("hybrid",)

    def for_folder(self, config: Any, names: Container[str]) -> Any:
        if "mtp.layers.0.eh_proj.weight" in names or not config.num_nextn_predict_layers:
            return config
        without = copy.deepcopy(config)  # transformers keeps the number and drops the layers
        without.num_nextn_predict_layers = 0
        return without

    def check(self, config: Any) -> None:
        self.keys.check(config)
        self.flags(config)

    def flags(self, config: Any) -> dict[str, Any]:
        pattern = self.layer_pattern(config)
        flags: dict[str, Any] = {
            "--hybrid-layer-pattern": pattern,
            "--hidden-size": config.hidden_size,
            "--ffn-hidden-size": config.intermediate_size,
            "--num-attention-heads": config.num_attention_heads,
            "--group-query-attention": True,
            "--num-query-groups": config.num_key_value_heads,
            "--kv-channels": config.head_dim,
            "--normalization": "RMSNorm",
            "--norm-epsilon": config.layer_norm_epsilon,
            "--squared-relu": True,
            "--disable-bias-linear": True,
            "--position-embedding-type": "none",
            "--max-position-embeddings": config.max_position_embeddings,
            "--attention-dropout": float(config.attention_dropout),
            "--hidden-dropout": float(config.hidden_dropout),
            "--mamba-state-dim": config.ssm_state_size,
            "--mamba-head-dim": config.mamba_head_dim,
            "--mamba-num-groups": config.n_groups,
            "--mamba-num-heads": config.mamba_num_heads,
            "--untie-embeddings-and-output-weights": True,
        }
        if "E" in pattern:
            flags |= {
                "--num-experts": config.n_routed_experts,
                "--moe-ffn-hidden-size": config.moe_intermediate_size,
                "--moe-router-topk": config.num_experts_per_tok,
                "--moe-shared-expert-intermediate-size": config.moe_shared_expert_intermediate_size,
                **sigmoid_router_flags(config),
            }
            if config.moe_latent_size is not None:
                flags["--moe-latent-size"] = config.moe_latent_size
        return flags

    def layer_pattern(self, config: Any) -> str:
        return "".join(_SYMBOLS[kind] for kind in config.layers_block_type)

    def stacked_layers(self, config: Any) -> bool:
        return False

    def copies(self, config: Any) -> dict[str, str]:
        return {}

    def entries(self, config: Any) -> Iterator[Entry]:
        h = config.hidden_size
        vocabulary = (config.vocab_size, h)
        embedding, head = "backbone.embeddings.weight", "lm_head.weight"
        yield outside("embedding.word_embeddings.weight", embedding, vocabulary, padded=True)
        for layer, symbol in enumerate(self.layer_pattern(config)):
            block = Block(f"backbone.layers.{layer}.", layer)
            if symbol == "M":
                yield from _mamba(config, block)
            elif symbol == "*":
                yield from attention(block, Heads.of(config), within="mixer.", norm="norm.weight")
            else:
                yield block.entry("pre_mlp_layernorm.weight", "norm.weight", (h,))
                width = config.intermediate_size
                yield from _experts(config, block) if symbol == "E" else _mlp(block, h, width)
        yield outside("decoder.final_layernorm.weight", "backbone.norm_f.weight", (h,))
        yield outside("output_layer.weight", head, vocabulary, padded=True)


def _mamba(config: Any, block: Block) -> Iterator[Entry]:
    """A Mamba layer. Its norm is stored as one of the projection's."""
    h, heads = config.hidden_size, config.mamba_num_heads
    inner, state = heads * config.mamba_head_dim, config.n_groups * config.ssm_state_size
    convolved = (("x", inner), ("B", state), ("C", state))
    projected = (("z", inner), *convolved, ("dt", heads))
    channels = inner + 2 * state
    yield block.entry("mixer.in_proj.layer_norm_weight", "norm.weight", (h,))
    kernel = (channels, 1, config.conv_kernel)

    def same(name: str, shape: tuple[int, ...], pieces: tuple[tuple[str, int], ...] = ()) -> Entry:
        return block.entry(f"mixer.{name}", f"mixer.{name}", shape, pieces=pieces)

    yield same("in_proj.weight", (channels + inner + heads, h), projected)
    yield same("conv1d.weight", kernel, convolved)
    yield same("conv1d.bias", (channels,), convolved)
    yield same("dt_bias", (heads,))
    yield same("A_log", (heads,))
    yield same("D", (heads,))
    yield same("norm.weight", (inner,))
    yield same("out_proj.weight", (h, inner))


def _mlp(
    block: Block,
    hidden: int,
    width: int,
    name: str = "mlp.",
    within: str = "mixer.",
    expert: int | None = None,
) -> Iterator[Entry]:
    """A feed-forward without a gate."""
    up, down = f"{within}up_proj.weight", f"{within}down_proj.weight"
    yield block.entry(f"{name}linear_fc1.weight", up, (width, hidden), expert=expert)
    yield block.entry(f"{name}linear_fc2.weight", down, (hidden, width), expert=expert)


def _experts(config: Any, block: Block) -> Iterator[Entry]:
    """A router, its bias, experts (in a latent space where there is one) and the shared one."""
    h, count, latent = config.hidden_size, config.n_routed_experts, config.moe_latent_size
    bias = "mixer.gate.e_score_correction_bias"
    yield block.entry("mlp.router.weight", "mixer.gate.weight", (count, h))
    yield block.entry("mlp.router.expert_bias", bias, (count,), dtype="float32")
    if latent is not None:
        for name, shape in (("fc1", (latent, h)), ("fc2", (h, latent))):
            name = f"{name}_latent_proj.weight"
            yield block.entry(f"mlp.{name}", f"mixer.{name}", shape)
    for expert in range(count):
        ours, theirs = "mlp.experts.experts.", f"mixer.experts.{expert}."
        yield from _mlp(block, latent or h, config.moe_intermediate_size, ours, theirs, expert)
    width = config.moe_shared_expert_intermediate_size
    yield from _mlp(block, h, width, "mlp.shared_experts.", "mixer.shared_experts.")
