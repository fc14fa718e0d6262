"""What the CPU lane uses of Megatron: the parts that it stands in for, and those around them."""

from __future__ import annotations

from megatron_moe_inject.host.contract import Contract, Use, Wrapped, symbols
from megatron_moe_inject.host.uses import HELPERS, MAMBA_LAYER

_ARGUMENTS = "megatron.training.arguments"
_CORE = "megatron.core"
_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
_PARALLEL = "megatron.core.parallel_state"

LANE_ARGUMENTS = Wrapped(f"{_ARGUMENTS}.add_megatron_arguments", does="defaults that need no GPU")
LANE_VALIDATION = Wrapped(
    f"{_ARGUMENTS}.validate_args", ("args",), does="refuses flags that need a GPU"
)
LANE_STATE_DICT = Wrapped(
    f"{_DISTRIBUTED}.state_dict", ("self",), does="saves without a step taken"
)
LANE_LOAD = Wrapped(
    f"{_DISTRIBUTED}.load_state_dict", ("self",), does="a step count for each parameter"
)
LANE_SET_STATES = Wrapped(
    f"{_DISTRIBUTED}._set_main_param_and_optimizer_states",
    ("tensors",),
    does="leaves the step out of a parameter's state",
)
UNTOUCHED_STATE = Wrapped(
    "torch.optim.Optimizer.state_dict", does="the same, of the inner optimizer meanwhile"
)
LANE_ATTENTION = Wrapped(
    f"{_CORE}.transformer.dot_product_attention.DotProductAttention.forward",
    ("self", "query", "key", "value", "attention_mask", "packed_seq_params"),
    does="attention over packed documents",
)
LANE_ATTENTION_SIZES = Wrapped(
    f"{_CORE}.transformer.dot_product_attention.DotProductAttention.__init__",
    ("self",),
    does="values of another head size than keys; sinks that are marked as sharded",
)
LANE_LAYERS = Wrapped(
    f"{_CORE}.models.gpt.gpt_layer_specs.get_gpt_layer_local_submodules",
    ("multi_latent_attention",),
    does="multi-latent attention projects down as with Transformer Engine",
)
LANE_ROW_LINEAR = Wrapped(
    f"{_CORE}.tensor_parallel.RowParallelLinear.__init__",
    ("self",),
    does="of experts: a bias whose gradient is not summed twice over TP",
)
LANE_ROW_OUTPUT = Wrapped(
    f"{_CORE}.tensor_parallel.RowParallelLinear.forward",
    ("self",),
    does="of experts with biases: an output that one may add to in place",
)
CPU_LANE = Contract(
    "--cpu",
    (
        LANE_ARGUMENTS,
        LANE_VALIDATION,
        LANE_STATE_DICT,
        LANE_LOAD,
        LANE_SET_STATES,
        UNTOUCHED_STATE,
        LANE_ATTENTION,
        LANE_ATTENTION_SIZES,
        LANE_LAYERS,
        LANE_ROW_LINEAR,
        LANE_ROW_OUTPUT,
        *symbols(f"{_CORE}.tensor_parallel", "set_tensor_model_parallel_attributes"),
        *symbols(f"{_CORE}.transformer.module", "MegatronModule"),
        *symbols(f"{_CORE}.transformer.multi_latent_attention", "TELinear"),
        Use(
            f"{_CORE}.transformer.utils.make_sharded_tensors_for_checkpoint",
            ("dp_cp_group", "tp_group"),
        ),
        HELPERS,
        *symbols(f"{_CORE}.optimizer.distrib_optimizer", "HAVE_APEX_OR_TE"),
        *symbols(f"{_CORE}.transformer.dot_product_attention", "DotProductAttention"),
        *symbols(_PARALLEL, "get_context_parallel_group"),
        Use(f"{_CORE}.tensor_parallel.gather_from_sequence_parallel_region", ("group",)),
        *symbols(f"{_CORE}.transformer.enums", "AttnMaskType", "AttnMaskType.causal"),
        *symbols(f"{_CORE}.transformer.moe.moe_utils", "maybe_move_tensor_to_cpu"),
        *symbols(f"{_CORE}.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu"),
        *symbols(f"{_CORE}.transformer", "attention.TENorm", "torch_norm.WrappedTorchNorm"),
        *symbols(f"{_CORE}.models.backends", "LocalSpecProvider"),
        Use(
            f"{_CORE}.models.gpt.gpt_layer_specs.get_gpt_layer_local_submodules",
            ("multi_latent_attention", "normalization", "num_experts", "qk_layernorm"),
        ),
        *symbols(f"{_CORE}.models.hybrid.hybrid_block", "HybridStack", "TENorm"),
        Use(
            f"{_CORE}.models.hybrid.hybrid_block.HybridStackSubmodules",
            ("attention_layer", "mamba_layer", "mlp_layer", "moe_layer", "mtp_block_spec"),
        ),
        Use(
            f"{_CORE}.models.hybrid.hybrid_block.HybridStackSubmodules",
            ("mla_layer",),
            optional="0.19 and later",
        ),
        *symbols(
            f"{_CORE}.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec", "mamba_stack_spec"
        ),
        *symbols("megatron.training.models.hybrid", "default_hybrid_stack_spec"),
        *symbols(f"{_CORE}.ssm.mlp_layer", "MLPLayer"),
        *symbols(f"{_CORE}.transformer.identity_op", "IdentityFuncOp", "IdentityOp"),
        *symbols(f"{_CORE}.transformer.transformer_layer", "MoETransformerLayer"),
        Use(f"{_CORE}.transformer.spec_utils.ModuleSpec", ("module", "submodules")),
        *symbols(
            f"{_CORE}.transformer.multi_token_prediction",
            "MultiTokenPredictionBlock",
            "get_mtp_layer_spec_for_backend",
        ),
        Use(
            f"{_CORE}.transformer.multi_token_prediction.MultiTokenPredictionBlockSubmodules",
            ("layer_specs",),
        ),
        *symbols(f"{_CORE}.tensor_parallel.inference_layers", "HAVE_TE"),
        *symbols(
            f"{_CORE}.ssm.mamba_mixer",
            "ExtendedRMSNorm",
            "HAVE_EINOPS",
            "HAVE_MAMBA_SSM",
            "_check_mamba_sequence_packing_support",
            "mamba_chunk_scan_combined",
            "mamba_split_conv1d_scan_combined",
        ),
        *symbols(f"{_CORE}.ssm.mamba_context_parallel", "HAVE_EINOPS"),
        Use(MAMBA_LAYER),
        *symbols(f"{_CORE}.ssm.mamba_mixer", "MambaMixer"),
        Use(
            f"{_CORE}.ssm.mamba_layer.MambaLayerSubmodules",
            ("mamba_bda", "mixer", "norm", "sharded_state_dict_keys_map"),
        ),
        Use(f"{_CORE}.ssm.mamba_mixer.MambaMixerSubmodules", ("in_proj", "out_proj")),
        *symbols(f"{_CORE}.fusions.fused_bias_dropout", "get_bias_dropout_add"),
        *symbols(f"{_CORE}.tensor_parallel", "ColumnParallelLinear", "RowParallelLinear"),
        Use(
            f"{_CORE}.ssm.mamba_mixer.make_sharded_tensors_for_checkpoint",
            ("dp_cp_group", "tp_group"),
        ),
        *symbols(_PARALLEL, "get_tensor_model_parallel_group"),
        Use(
            f"{_CORE}.transformer.multi_token_prediction.is_inference_column_parallel_linear",
            optional="0.20 and later",
        ),
    ),
)
