"""A model's architecture, from the arguments stored in its checkpoint.

Megatron's own translation from arguments to a config is used, so a flag that shapes the model
means here what it meant when the teacher was trained. What only says how a run was executed
(parallel layout, recomputation, low precision, fusions, dropout, CUDA graphs) is set to its
neutral value: unknown flags are kept rather than dropped, because dropping one that shapes the
model would change the teacher silently. So it is with routers: losses on them, noise, limits of
capacity and padding are left out, and every token passes the experts that its scores choose.
"""

from __future__ import annotations

import argparse
import dataclasses
from argparse import Namespace
from typing import Any

import torch

from megatron_moe_inject.host.layer_pattern import EXPERTS, LayerPattern, pattern_of
from megatron_moe_inject.teachers.base import Source

POSITIONS = ("rope", "learned_absolute", "none")

_EXECUTION_PREFIXES = (
    "account_for_",
    "cpu_offloading",
    "cuda_graph",
    "delay_offload",
    "delta_offload",
    "fine_grained_",
    "fp4",
    "fp8",
    "fused_",
    "inference_",
    "moe_aux_",
    "moe_deepep_",
    "moe_enable_",
    "moe_expert_",
    "moe_flex_",
    "moe_grouped_",
    "moe_hybridep_",
    "moe_input_jitter_",
    "moe_layer_recompute",
    "moe_ncclep_",
    "moe_pad_",
    "moe_paged_",
    "moe_per_layer_",
    "moe_permute_",
    "moe_router_bias_update_",
    "moe_router_force_",
    "moe_router_fusion",
    "moe_router_load_",
    "moe_router_padding_",
    "moe_router_quantile_",
    "moe_shared_expert_overlap",
    "moe_single_",
    "moe_token_",
    "moe_use_legacy_",
    "moe_z_",
    "mtp_",
    "offload_",
    "recompute_",
)
_EXECUTION_FIELDS = (
    "activation_func_fp8_input_store",
    "batch_invariant_mode",
    "calculate_per_token_loss",
    "config_logger_dir",
    "deterministic_mode",
    "disable_parameter_transpose_cache",
    "distribute_saved_activations",
    "enable_cuda_graph",
    "external_cuda_graph",
    "first_last_layers_bf16",
    "flash_attention_version",
    "flash_decode",
    "inference_rng_tracker",
    "init_model_with_meta_device",
    "kitchen_attention_backend",
    "log_max_attention_logit",
    "mlp_chunks_for_prefill",
    "mlp_chunks_for_training",
    "nccl_all_reduce_for_prefill",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
    "qk_clip",
    "quant_recipe",
    "symmetric_ar_type",
    "test_mode",
    "tp_only_amax_red",
    "use_inference_optimized_layers",
    "use_kitchen",
    "use_kitchen_attention",
    "use_te_rng_tracker",
    "use_transformer_engine_op_fuser",
)


@dataclasses.dataclass(frozen=True)
class _Refusal:
    argument: str
    what: str
    remedy: str = "use another GPT or hybrid checkpoint"


_REFUSALS = (
    _Refusal(
        "moe_router_topk_limited_devices",
        "routes by the ranks that its experts lay on",
        "write its --moe-router-num-groups and --moe-router-group-topk into its checkpoint",
    ),
    _Refusal("heterogeneous_layers_config_path", "has layers of different architectures"),
    _Refusal("heterogeneous_layers_config_encoded_json", "has layers of different architectures"),
    _Refusal("experimental_attention_variant", "uses an experimental attention"),
    _Refusal("yaml_cfg", "was configured by --yaml-cfg, which keeps no flags"),
)
_BY_ALL_TOKENS = ("quantile_balancing", "sinkhorn")
"""Values of ``--moe-router-load-balancing-type``."""
_CUSTOM_SPEC = _Refusal("spec", "was built from a custom --spec")
_BY_RATIO = _Refusal(
    "is_hybrid_model",
    "is a hybrid model without a pattern of layers",
    "load it with the Megatron that wrote it and --hybrid-layer-pattern, and save it again",
)
_OF_HYBRID = (("D", _Refusal("hybrid_layer_pattern", "uses an experimental attention")),)
"""Refused layers of a pattern, by their symbols."""
_STACK_SPECS = [
    [f"megatron.core.models.{module}", name]
    for module in ("hybrid.hybrid_layer_specs", "mamba.mamba_layer_specs")
    for name in ("hybrid_stack_spec", "mamba_stack_spec")
]
"""Values of ``--spec`` that name Megatron's own layers of hybrid models."""


def refuse_unsupported(source: Source, args: Namespace) -> None:
    """Raise for an architecture that cannot be a teacher.

    Raises:
        RecipeError: naming the argument of the teacher's checkpoint and its value.
    """
    pattern = pattern_of(args)
    refusals = list(_REFUSALS)
    if pattern is None:
        refusals += [_BY_RATIO, _CUSTOM_SPEC]
    else:
        refusals += [refusal for symbol, refusal in _OF_HYBRID if pattern.where(symbol)]
        if getattr(args, "spec", None) not in _STACK_SPECS:
            refusals.append(_CUSTOM_SPEC)
    for refusal in refusals:
        value = getattr(args, refusal.argument, None)
        if value:
            where = f"its argument {refusal.argument} is {value!r:.60}"
            raise source.error(f"{refusal.what} ({where})", refusal.remedy)
    balancing = getattr(args, "moe_router_load_balancing_type", None)
    kinds = [balancing] if isinstance(balancing, str) else (balancing or [])
    for kind in sorted(set(kinds) & set(_BY_ALL_TOKENS)):
        raise source.error(
            f"has routers of type {kind}, which assign all tokens of a batch together",
            "use a teacher whose routers read each token by itself",
        )
    positions = getattr(args, "position_embedding_type", "learned_absolute")
    if positions not in POSITIONS:
        raise source.error(
            f"has position embeddings of type {positions!r}",
            f"supported: {', '.join(POSITIONS)}",
        )


def refuse_states_across_documents(source: Source, args: Namespace) -> None:
    """Raise for a model whose layers carry a state from one document of a window to the next.

    Raises:
        RecipeError: with its layers.
    """
    pattern = pattern_of(args)
    if pattern is not None and pattern.where("MG"):
        raise source.error(
            f"has layers with a state ({pattern.symbols}), which goes on across the documents that "
            "--reset-position-ids and --reset-attention-mask set apart",
            "remove these flags, or use a teacher of attention layers",
        )


def _default_arguments() -> dict[str, Any]:
    """Every argument of the installed Megatron at its default, for flags newer than the teacher."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return vars(parser.parse_known_args([])[0])


def _neutral_fields() -> dict[str, Any]:
    """Fields of Megatron's config that say how a run is executed, at the class's defaults."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    layout = {f.name for f in dataclasses.fields(ModelParallelConfig)}
    neutral = {}
    for field in dataclasses.fields(TransformerConfig):
        executes = field.name in _EXECUTION_FIELDS or field.name.startswith(_EXECUTION_PREFIXES)
        if not executes and field.name not in layout:
            continue
        if field.default is not dataclasses.MISSING:
            neutral[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            neutral[field.name] = field.default_factory()
    return neutral


def teacher_arguments(
    saved: Namespace, *, params_dtype: torch.dtype, on_gpu: bool, use_te: bool, ep: int = 1
) -> Namespace:
    """Arguments that build the saved model on one rank, for evaluation.

    Args:
        saved: arguments stored in the checkpoint.
        ep: ranks that hold its experts together.
        params_dtype: type of parameters and activations.
        on_gpu: keep the fusions that the teacher was trained with.
        use_te: build with Transformer Engine layers.
    """
    from megatron.core.transformer.enums import AttnBackend

    known = _default_arguments() | vars(saved) | _neutral_fields()
    args = Namespace(**known)
    args.params_dtype = params_dtype
    args.fp16 = params_dtype == torch.float16
    args.bf16 = params_dtype == torch.bfloat16
    args.perform_initialization = False
    args.use_cpu_initialization = not on_gpu
    args.transformer_impl = "transformer_engine" if use_te else "local"
    args.attention_backend = AttnBackend.auto
    args.hidden_dropout = args.attention_dropout = 0.0
    # Scales scores down and back up around the softmax: the same numbers, an fp16 safeguard.
    args.apply_query_key_layer_scaling = False
    args.bias_dropout_fusion = on_gpu and args.bias_dropout_fusion
    args.bias_swiglu_fusion = on_gpu and args.bias_swiglu_fusion
    args.bias_gelu_fusion = on_gpu and args.bias_gelu_fusion
    args.apply_rope_fusion = use_te and args.apply_rope_fusion
    args.masked_softmax_fusion = False
    args.expert_model_parallel_size, args.expert_tensor_parallel_size = ep, 1
    # The other dispatchers want as many tokens on every rank, or kernels of their own.
    args.moe_token_dispatcher_type = "alltoall"
    args.moe_router_load_balancing_type = "none"
    args.moe_grouped_gemm = use_te and bool(number_of_experts(saved))
    args.no_persist_layer_norm = True
    args.memory_efficient_layer_norm = False
    args.cp_comm_type = ["p2p"]
    args.fp8_param_gather = args.fp4_param_gather = False
    args.decoder_first_pipeline_num_layers = args.decoder_last_pipeline_num_layers = None
    args.kitchen_config_file = args.kitchen_recipe_number = args.te_precision_config_file = None
    pattern = pattern_of(saved)
    if pattern is not None:
        # One stage, without what comes behind the slash.
        args.hybrid_layer_pattern, args.hybrid_override_pattern = pattern.symbols, None
    args.num_layers = number_of_layers(saved)
    return args


def number_of_layers(args: Namespace) -> int:
    """Layers of the decoder; of a hybrid model one for each symbol of its pattern."""
    pattern = pattern_of(args)
    return args.num_layers if pattern is None else pattern.num_layers


def number_of_experts(args: Namespace) -> int:
    """Routed experts of each layer that has some; 0 of a dense model."""
    pattern = pattern_of(args)
    if pattern is not None and not pattern.where(EXPERTS):
        return 0
    return getattr(args, "num_experts", None) or 0


def low_precision_widths(args: Namespace) -> dict[str, int]:
    """What the linear layers' widths are multiples of, by name, for FP8."""
    widths = {"hidden": args.hidden_size, **_widths_of_attention(args), **_widths_of_mlps(args)}
    pattern = pattern_of(args)
    return widths if pattern is None else widths | _widths_of_recurrences(args, pattern)


def _widths_of_attention(args: Namespace) -> dict[str, int]:
    """Of what the layers behind attention and latent projections read."""
    heads, size = args.num_attention_heads, getattr(args, "kv_channels", None)
    if not getattr(args, "multi_latent_attention", False):
        return {} if size is None else {"attention": heads * size}
    ranks = {"latent queries": args.q_lora_rank, "latent keys": args.kv_lora_rank}
    known = {name: rank for name, rank in ranks.items() if rank is not None}
    return known | {"attention": heads * args.v_head_dim}


def _widths_of_mlps(args: Namespace) -> dict[str, int]:
    """Of dense layers, unless all have experts, and of experts."""
    if not number_of_experts(args):
        return {"ffn": args.ffn_hidden_size}
    frequency = getattr(args, "moe_layer_freq", 1)
    everywhere = frequency == 1 if isinstance(frequency, int) else all(frequency)
    dense = not everywhere or pattern_of(args) is not None
    widths = {
        "ffn": args.ffn_hidden_size if dense else None,
        "experts": getattr(args, "moe_ffn_hidden_size", None) or args.ffn_hidden_size,
        "shared experts": getattr(args, "moe_shared_expert_intermediate_size", None),
        "latent states": getattr(args, "moe_latent_size", None),
    }
    return {name: width for name, width in widths.items() if width is not None}


def _widths_of_recurrences(args: Namespace, pattern: LayerPattern) -> dict[str, int]:
    widths = {}
    if pattern.where("M"):
        heads = args.mamba_num_heads or 2 * args.hidden_size // args.mamba_head_dim
        inner = heads * args.mamba_head_dim
        widths["Mamba's channels"] = inner
        in_proj = 2 * inner + 2 * args.mamba_num_groups * args.mamba_state_dim + heads
        widths["Mamba's input projection"] = in_proj
    if pattern.where("G"):
        values = args.linear_num_value_heads * args.linear_value_head_dim
        keys = args.linear_num_key_heads * args.linear_key_head_dim
        widths["the delta net's values"] = values
        in_proj = 2 * values + 2 * keys + 2 * args.linear_num_value_heads
        widths["the delta net's input projection"] = in_proj
    return widths


def describe(args: Namespace) -> dict[str, Any]:
    """Sizes and switches of the architecture, for a report."""
    special = ("swiglu", "quick_geglu", "squared_relu")
    activation = next((name for name in special if getattr(args, name, False)), "gelu")
    grouped = getattr(args, "group_query_attention", False)
    pattern = pattern_of(args)
    return {
        "layers": number_of_layers(args),
        **({} if pattern is None else {"pattern": pattern.symbols}),
        "hidden": args.hidden_size,
        "ffn": args.ffn_hidden_size,
        "heads": args.num_attention_heads,
        "kv_groups": args.num_query_groups if grouped else args.num_attention_heads,
        **_experts(args),
        "activation": activation,
        "normalization": getattr(args, "normalization", "LayerNorm"),
        "positions": getattr(args, "position_embedding_type", "learned_absolute"),
        "linear_bias": getattr(args, "add_bias_linear", True),
        "qkv_bias": getattr(args, "add_qkv_bias", False),
        "qk_layernorm": getattr(args, "qk_layernorm", False),
        "tied_embeddings": not getattr(args, "untie_embeddings_and_output_weights", False),
    }


def _experts(args: Namespace) -> dict[str, Any]:
    number = number_of_experts(args)
    if not number:
        return {}
    shared = getattr(args, "moe_shared_expert_intermediate_size", None)
    return {
        "experts": number,
        "topk": args.moe_router_topk,
        "expert_ffn": args.moe_ffn_hidden_size or args.ffn_hidden_size,
        **({} if shared is None else {"shared_experts_ffn": shared}),
    }
