"""What planning uses of Megatron: how a job is made, laid out and scheduled."""

from __future__ import annotations

from megatron_moe_inject.host.contract import Contract, Use, Wrapped, symbols
from megatron_moe_inject.host.uses import EXPERTS, GPT

_CORE = "megatron.core"
_TRAINING = "megatron.training"

CORE_FORWARD = Wrapped(
    f"{_CORE}.transformer.dot_product_attention.DotProductAttention.forward",
    ("query", "key", "value"),
    does="in a plan: keeps what a kernel keeps",
)
CORE_INIT = Wrapped(
    f"{_CORE}.transformer.dot_product_attention.DotProductAttention.__init__",
    ("self",),
    does="in a plan: takes heads of any kind",
)
NORM_FORWARD = Wrapped("torch.nn.RMSNorm.forward", does="in a plan: keeps what a kernel keeps")
SCAN = Wrapped(
    f"{_CORE}.ssm.mamba_mixer.MambaMixer._ssm_training",
    ("zxBCdt", "packed_seq_params"),
    does="in a plan: keeps what a kernel keeps",
)
PLANNING = Contract(
    "moe-inject plan --gpus",
    (
        *symbols(f"{_TRAINING}.arguments", "add_megatron_arguments", "validate_args"),
        *symbols(f"{_TRAINING}.global_vars", "set_global_variables"),
        Use(f"{_TRAINING}.initialize._initialize_distributed"),
        Use(
            f"{_TRAINING}.training.setup_model_and_optimizer", ("model_type", "model_provider_func")
        ),
        *symbols(f"{_TRAINING}.training", "to_empty_if_meta_device", "has_nvidia_modelopt"),
        *symbols(f"{_TRAINING}.utils", "get_blend_and_blend_per_split"),
        *symbols(f"{_CORE}.parallel_state", "destroy_model_parallel"),
        *symbols(f"{_CORE}.tensor_parallel", "model_parallel_cuda_manual_seed"),
        Use(
            f"{_CORE}.tensor_parallel.gather_from_sequence_parallel_region",
            ("group", "tensor_parallel_output_grad"),
        ),
        Use(f"{_CORE}.enums.ModelType.encoder_or_decoder"),
        Use(f"{_CORE}.transformer.dot_product_attention.DotProductAttention"),
        Use(EXPERTS, attributes=("local_experts",)),
        Use(
            f"{_CORE}.distributed.param_and_grad_buffer.group_params_for_buffers",
        ),
        Use(
            f"{_CORE}.optimizer.distrib_optimizer.DistributedOptimizer.compute_full_param_layout",
            ("expert_data_parallel_world_size",),
        ),
        Use(
            f"{_CORE}.distributed.DistributedDataParallel",
            attributes=(
                *("bucket_size", "buffers", "ddp_config", "expert_parallel_buffers"),
                *("intra_dp_cp_group", "intra_expt_dp_group"),
                *("bucket_groups", "expert_parallel_bucket_groups"),
            ),
        ),
        Use(
            f"{_CORE}.distributed.DistributedDataParallel.disable_forward_pre_hook",
            ("param_sync",),
        ),
        Use(
            f"{_CORE}.distributed.param_and_grad_buffer._ParamAndGradBuffer",
            attributes=("grad_data",),
        ),
        Use(
            f"{_CORE}.distributed.param_and_grad_buffer._ParamAndGradBucketGroup",
            attributes=("is_last_microbatch",),
        ),
        Use(
            f"{_CORE}.optimizer.param_layout.PerBufferParamLayout",
            attributes=("bucket_indices", "param_index_map"),
        ),
        Use(GPT, attributes=("mtp_process", "set_input_tensor")),
        Use(
            f"{_CORE}.ssm.mamba_mixer.MambaMixer",
            attributes=("chunk_size", "cp", "d_state", "headdim", "norm", "rmsnorm"),
        ),
        Use(
            f"{_CORE}.ssm.mamba_context_parallel.MambaContextParallel",
            attributes=(
                *("d_inner_local_tpcp", "ngroups_local_tpcp"),
                *("get_A_log", "get_D", "get_conv1d_bias", "get_conv1d_weight", "get_dt_bias"),
                "post_conv_ssm",
            ),
        ),
        CORE_FORWARD,
        CORE_INIT,
        NORM_FORWARD,
        SCAN,
    ),
)
"""What is built with, and which of its functions lay out buffers and shards."""
