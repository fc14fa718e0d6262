"""What ``host`` uses of Megatron: every run, the map of a model, our own entry, the CPU lane."""

from __future__ import annotations

from megatron_moe_inject.host.contract import Contract, Hooked, Use, Wrapped, symbols

BLOCK = "megatron.core.transformer.transformer_block.TransformerBlock"
DISPATCHER = "megatron.core.transformer.moe.token_dispatcher.MoETokenDispatcher"
GPT = "megatron.core.models.gpt.gpt_model.GPTModel"
HYBRID = "megatron.core.models.hybrid.hybrid_model.HybridModel"
STACK = "megatron.core.models.hybrid.hybrid_block.HybridStack"
GROUPED_EXPERTS = "megatron.core.transformer.moe.experts.TEGroupedMLP"
EXPERTS = "megatron.core.transformer.moe.experts.SequentialMLP"
LAYER = "megatron.core.transformer.transformer_layer.TransformerLayer"
MAMBA_LAYER = "megatron.core.ssm.mamba_layer.MambaLayer"
MOE_LAYER = "megatron.core.transformer.moe.moe_layer.MoELayer"
ROUTER = "megatron.core.transformer.moe.router.TopKRouter"

_ARGUMENTS = "megatron.training.arguments"
_CHECKPOINTING = "megatron.training.checkpointing"
_CORE = "megatron.core"
_CONFIG = "megatron.core.transformer.transformer_config.TransformerConfig"
_PARALLEL = "megatron.core.parallel_state"
_TRAINING = "megatron.training.training"
_SCHEDULE = (
    "forward_step_func",
    "data_iterator",
    "model",
    "num_microbatches",
    "seq_length",
    "micro_batch_size",
    "forward_only",
    "p2p_communicator",
    "pg_collection",
)

EVERY_RUN = Contract(
    "every run",
    (
        *symbols(
            "megatron.training",
            "get_args",
            "get_tensorboard_writer",
            "get_wandb_writer",
            "print_rank_0",
        ),
        *symbols("megatron.training.global_vars", "get_timers", "get_tokenizer"),
        Use(f"{_TRAINING}.setup_model_and_optimizer", ("model_provider_func",)),
        Use(
            f"{_TRAINING}.train",
            (
                "forward_step_func",
                "model",
                "valid_data_iterator",
                "process_non_loss_data_func",
                "config",
            ),
        ),
        Use(
            f"{_TRAINING}.training_log",
            (
                "loss_dict",
                "total_loss_dict",
                "learning_rate",
                "iteration",
                "skipped_iter",
                "grad_norm",
                "is_first_iteration",
            ),
        ),
        Use(
            f"{_TRAINING}.evaluate_and_print_results",
            ("prefix", "data_iterator", "iteration", "write_to_tensorboard"),
        ),
        *symbols(
            _TRAINING,
            "build_pretraining_data_loader",
            "enable_forward_pre_hook",
            "should_disable_forward_pre_hook",
        ),
        Use(f"{_TRAINING}.disable_forward_pre_hook", ("param_sync",)),
        *symbols(
            _CHECKPOINTING,
            "_NON_PERSISTENT_CKPT_SUBDIR",
            "_build_sharded_state_dict_metadata",
            "_get_checkpoint_format",
            "checkpoint_exists",
            "find_checkpoint_rank_0",
            "get_checkpoint_tracker_filename",
            "read_metadata",
        ),
        Use(f"{_CHECKPOINTING}.get_checkpoint_name", ("return_base_dir",)),
        Use(f"{_CHECKPOINTING}._load_base_checkpoint", ("rank0", "sharded_state_dict")),
        *symbols(f"{_CORE}.dist_checkpointing", "ShardedTensor", "load_common_state_dict"),
        Use(
            f"{_CORE}.dist_checkpointing.mapping.ShardedTensor",
            attributes=(
                "axis_fragmentations",
                "data",
                "global_offset",
                "global_shape",
                "key",
                "local_shape",
                "prepend_axis_num",
            ),
        ),
        Use(f"{_CORE}.dist_checkpointing.mapping.ShardedObject", attributes=("key",)),
        Use(
            f"{_CORE}.dist_checkpointing.mapping.ShardedTensorFactory",
            attributes=("build", "build_fn", "data"),
        ),
        Use(f"{_CORE}.num_microbatches_calculator.update_num_microbatches", ("consistency_check",)),
        *symbols(f"{_CORE}.num_microbatches_calculator", "get_current_running_global_batch_size"),
        *symbols(f"{_CORE}.utils", "get_attr_wrapped_model", "unwrap_model"),
        *symbols(f"{_CORE}.fp8_utils", "is_first_last_bf16_layer"),
        Use(
            f"{_CORE}.rerun_state_machine.get_rerun_state_machine",
        ),
        Use(
            f"{_CORE}.rerun_state_machine.RerunStateMachine",
            attributes=("current_iteration", "rerun_requested", "state"),
        ),
        *symbols(f"{_CORE}.rerun_state_machine", "RerunState", "RerunState.NOT_RUNNING_YET"),
        *symbols(f"{_CORE}.process_groups_config", "ProcessGroupCollection.use_mpu_process_groups"),
        Use(
            f"{_CORE}.process_groups_config.ProcessGroupCollection",
            attributes=(
                *("tp", "pp", "cp", "dp", "mp", "embd", "pos_embd"),
                *("tp_cp", "dp_cp", "tp_dp_cp", "expt_tp", "expt_dp"),
            ),
        ),
        *(
            Use(f"{_CORE}.pipeline_parallel.schedules.{name}", _SCHEDULE)
            for name in (
                "forward_backward_no_pipelining",
                "forward_backward_pipelining_with_interleaving",
                "forward_backward_pipelining_without_interleaving",
            )
        ),
        Use(
            f"{_CORE}.pipeline_parallel.schedules._build_default_pg_collection",
            optional="0.19 and later",
        ),
        *symbols(
            _PARALLEL,
            "get_context_parallel_group",
            "get_pipeline_model_parallel_group",
            "get_tensor_model_parallel_group",
        ),
        Use(f"{_PARALLEL}.get_data_parallel_group", ("with_context_parallel",)),
        Use(f"{_PARALLEL}.get_embedding_group", ("check_initialized",)),
        Use(f"{_PARALLEL}.get_position_embedding_group", ("check_initialized",)),
        Use(f"{_PARALLEL}.get_tensor_and_data_parallel_group", ("with_context_parallel",)),
        Use("megatron.training.argument_utils.gpt_config_from_args", optional="0.19 and later"),
        Use("megatron.training.argument_utils.hybrid_config_from_args"),
    ),
)

PLANNED_LOSS = Wrapped(
    f"{GPT}.build_schedule_plan",
    ("labels", "output_processor"),
    does="in a schedule plan: hands its hidden states to the loss",
)
PLANNED_CLOCK = Wrapped(
    f"{GPT}.build_schedule_plan", does="in a schedule plan: counts micro-batches"
)
MODEL = Contract(
    "every run",
    (
        Use(
            f"{GPT}.forward",
            ("labels", "loss_mask", "output_processor"),
        ),
        Use(
            GPT,
            attributes=(
                "decoder",
                "embedding",
                "output_layer",
                "post_process",
                "pre_process",
                "shared_embedding_or_output_weight",
            ),
        ),
        Use(BLOCK, attributes=("layers",)),
        Use(LAYER, attributes=("layer_number", "mlp")),
        Use(
            MOE_LAYER,
            attributes=(
                "experts",
                "local_expert_indices",
                "num_local_experts",
                "router",
                "token_dispatcher",
            ),
        ),
        Use(EXPERTS, attributes=("local_experts",)),
        Use(
            _CONFIG,
            attributes=(
                "calculate_per_token_loss",
                "context_parallel_size",
                "grad_scale_func",
                "gradient_accumulation_fusion",
                "microbatch_group_size_per_vp_stage",
                "moe_expert_capacity_factor",
                "num_moe_experts",
                "overlap_moe_expert_parallel_comm",
                "params_dtype",
                "sequence_parallel",
            ),
        ),
        Hooked(GPT, kind="forward pre-hook", does="hands its hidden states to the loss"),
        Hooked(GPT, kind="forward pre-hook", does="counts micro-batches: one begins"),
        Hooked(GPT, kind="forward hook", does="counts micro-batches: one ends"),
        PLANNED_LOSS,
        PLANNED_CLOCK,
        Use(
            "megatron.core.models.common.model_chunk_schedule_plan."
            "TransformerModelChunkSchedulePlan",
            attributes=("get_layer", "num_layers", "pre_process"),
        ),
        Use(
            "megatron.core.pipeline_parallel.utils.ScheduleNode",
            attributes=("backward_func", "inputs"),
        ),
        Hooked(
            GPT, kind="load_state_dict post-hook", does="notes what was loaded; gone after loading"
        ),
        Hooked(LAYER, kind="forward hook", does="in FP8: notes what is not finite"),
    ),
)

OUTPUT_LAYER = Wrapped(
    f"{_CORE}.tensor_parallel.ColumnParallelLinear.forward",
    ("input_", "weight"),
    does="of a hybrid model: keeps the last states, and forms no logits",
)
HYBRID_LOSS = Wrapped(
    f"{HYBRID}.compute_language_model_loss",
    ("labels", "logits"),
    does="of a hybrid model: the loss of the states that were kept",
)
HYBRID_STUDENT = Contract(
    "--hybrid-layer-pattern",
    (
        OUTPUT_LAYER,
        HYBRID_LOSS,
        Hooked(HYBRID, kind="forward pre-hook", does="tells multi-token prediction apart"),
        Use(f"{HYBRID}.forward", ("labels", "loss_mask")),
        Use(f"{HYBRID}.forward", ("compute_mtp_loss",), optional="0.20 and later"),
        Use(
            HYBRID,
            attributes=("decoder", "embedding", "mtp_process", "output_layer", "post_process"),
        ),
        Hooked(MAMBA_LAYER, kind="forward hook", does="in FP8: notes what is not finite"),
        Use(f"{_CORE}.dist_checkpointing.gpt_checkpoint_interop", optional="0.19 and later"),
        Use(MAMBA_LAYER, attributes=("layer_number",)),
        Use(STACK, attributes=("layers",)),
        Use(_CONFIG, attributes=("mtp_num_layers",)),
        *symbols(f"{_CORE}.transformer.moe.moe_logging", "MoEMetricsTracker"),
        *symbols(f"{_CORE}.transformer.moe.moe_logging", "MoEMetricsTracker.report"),
    ),
)

WATCHED_ROUTING = Wrapped(
    f"{ROUTER}.routing", ("logits", "padding_mask"), does="counts what routers decide"
)
ROUTING_WATCH = Contract(
    "routing in the log and in profiles",
    (
        WATCHED_ROUTING,
        Use(ROUTER, attributes=("config", "expert_bias", "score_function", "topk")),
        Use(
            f"{_CORE}.transformer.moe.moe_utils.topk_routing_with_score_function",
            (
                "expert_bias",
                "fused",
                "group_topk",
                "num_groups",
                "scaling_factor",
                "score_function",
                "use_pre_softmax",
            ),
        ),
        Use(
            _CONFIG,
            attributes=(
                "moe_router_fusion",
                "moe_router_group_topk",
                "moe_router_num_groups",
                "moe_router_pre_softmax",
                "moe_router_score_function",
                "moe_router_topk_scaling_factor",
            ),
        ),
    ),
)

PLAIN_QUERIES = Contract(
    "--spec megatron_moe_inject.host.plain_queries layers",
    (
        *symbols(f"{_CORE}.transformer.multi_latent_attention", "MLASelfAttention"),
        Use(
            f"{_CORE}.transformer.multi_latent_attention.MLASelfAttention._resolve_qk_norm_config",
            ("submodules",),
            optional="0.19 and later",
        ),
        Use(
            f"{_CORE}.transformer.mla_qk_norm_config.QKNormConfigResolver",
            attributes=("resolve",),
            optional="0.19 and later",
        ),
        Use("megatron.training.models.gpt.default_layer_spec", optional="0.19 and later"),
    ),
)
PROJECTION_NORMS = Contract(
    "--spec megatron_moe_inject.host.projection_norms layers",
    (
        *symbols(f"{_CORE}.transformer.module", "MegatronModule"),
        Use(f"{_CORE}.tensor_parallel.copy_to_tensor_model_parallel_region", ("group",)),
        Use(f"{_CORE}.tensor_parallel.reduce_from_tensor_model_parallel_region", ("group",)),
        *symbols(_PARALLEL, "get_tensor_model_parallel_group"),
        Use("megatron.training.models.gpt.default_layer_spec", optional="0.19 and later"),
    ),
)

GELU_GATES = Contract(
    "--spec megatron_moe_inject.host.gelu_gates layers",
    (
        *symbols(f"{_CORE}.activations", "fast_gelu"),
        Use(_CONFIG, attributes=("activation_func", "bias_activation_fusion", "gated_linear_unit")),
        Use("megatron.training.models.gpt.default_layer_spec", optional="0.19 and later"),
    ),
)

HELPERS = Wrapped(
    f"{_CORE}.datasets.utils.compile_helpers", does="uses the compiled helper that is there"
)
OWN_ENTRY = Contract(
    "megatron_moe_inject.pretrain",
    (
        HELPERS,
        *symbols("megatron.training", "get_timers", "pretrain"),
        *symbols("megatron.training.inprocess_restart", "maybe_wrap_for_inprocess_restart"),
        *symbols("megatron.training.argument_utils", "pretrain_cfg_container_from_args"),
        *symbols(_ARGUMENTS, "core_transformer_config_from_args"),
        Use(f"{_ARGUMENTS}.parse_and_validate_args", ("args_defaults",)),
        *symbols(_TRAINING, "update_seqlen_stats_from_cu_seqlens"),
        *symbols(
            "megatron.training.utils",
            "get_blend_and_blend_per_split",
            "is_first_or_last_pipeline_stage",
        ),
        *symbols(f"{_CORE}.enums", "ModelType", "ModelType.encoder_or_decoder"),
        Use(
            f"{_CORE}.models.gpt.GPTModel",
            (
                "config",
                "fp16_lm_cross_entropy",
                "max_sequence_length",
                "mtp_block_spec",
                "parallel_output",
                "pg_collection",
                "position_embedding_type",
                "post_process",
                "pre_process",
                "rope_scaling",
                "rotary_base",
                "rotary_percent",
                "share_embeddings_and_output_weights",
                "transformer_layer_spec",
                "vocab_size",
                "vp_stage",
            ),
        ),
        Use(
            HYBRID,
            (
                "config",
                "fp16_lm_cross_entropy",
                "hybrid_layer_pattern",
                "hybrid_stack_spec",
                "max_sequence_length",
                "parallel_output",
                "pg_collection",
                "position_embedding_type",
                "post_process",
                "pre_process",
                "rotary_base",
                "rotary_percent",
                "seq_len_interpolation_factor",
                "share_embeddings_and_output_weights",
                "vocab_size",
                "vp_stage",
            ),
        ),
        Use(
            "megatron.training.models.hybrid.HybridModelConfig",
            attributes=("hybrid_stack_spec", "seq_length", "transformer"),
        ),
        *symbols(f"{_CORE}.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"),
        *symbols(
            f"{_CORE}.models.gpt.gpt_layer_specs",
            "get_gpt_decoder_block_spec",
            "get_gpt_decoder_layer_specs",
        ),
        Use(
            f"{_CORE}.models.gpt.gpt_layer_specs.get_gpt_mtp_block_spec",
            ("use_transformer_engine", "vp_stage"),
        ),
        *symbols(f"{_CORE}.transformer.multi_token_prediction", "get_mtp_ranks"),
        Use(
            f"{_CORE}.transformer.multi_token_prediction.mtp_on_this_rank",
            ("ignore_virtual", "layout", "mtp_num_layers", "vp_stage"),
        ),
        *symbols(f"{_CORE}.utils", "StragglerDetector", "get_model_config"),
        *symbols(_CORE, "mpu"),
        *symbols(
            _PARALLEL,
            "get_hybrid_data_context_parallel_groups",
            "get_tensor_model_parallel_rank",
            "get_tensor_model_parallel_src_rank",
            "is_pipeline_first_stage",
            "is_pipeline_last_stage",
        ),
        *symbols(
            f"{_CORE}.datasets.blended_megatron_dataset_builder", "BlendedMegatronDatasetBuilder"
        ),
        *symbols(
            f"{_CORE}.datasets.gpt_dataset", "GPTDataset", "GPTDatasetConfig", "MockGPTDataset"
        ),
        *symbols("megatron.training.datasets.sft_dataset", "SFTDataset"),
        *symbols(f"{_CORE}.packed_seq_params", "PackedSeqParams"),
        *symbols(f"{_CORE}.tokenizers.utils.build_tokenizer", "build_tokenizer"),
        *symbols(f"{_CORE}.utils", "get_batch_on_this_cp_rank", "get_batch_on_this_tp_rank"),
        Use(f"{_CORE}.utils.flatten_batch_for_packed_sequences", optional="0.19 and later"),
    ),
)
