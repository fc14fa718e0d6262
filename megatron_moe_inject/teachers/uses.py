"""What ``teachers`` uses of Megatron, and what it wraps."""

from megatron_moe_inject.host.contract import Contract, Hooked, Use, Wrapped, symbols
from megatron_moe_inject.host.uses import (
    EXPERTS,
    GPT,
    GROUPED_EXPERTS,
    HYBRID,
    LAYER,
    MAMBA_LAYER,
    MOE_LAYER,
    ROUTER,
)

_CORE = "megatron.core"
_SPECS = "megatron.core.models.gpt.gpt_layer_specs"

DATA_FILES = Contract(
    "teachers",
    (
        Use(f"{_CORE}.datasets.indexed_dataset.IndexedDataset", ("mmap",)),
        *symbols(f"{_CORE}.datasets.indexed_dataset", "get_bin_path"),
    ),
)

WRITER = Contract(
    "store-teacher",
    (
        *symbols(f"{_CORE}.parallel_state", "destroy_model_parallel", "initialize_model_parallel"),
        *symbols(f"{_CORE}.tensor_parallel", "model_parallel_cuda_manual_seed"),
    ),
)

CONVERTER = Contract(
    "convert-store",
    (
        *symbols("megatron.training.arguments", "add_megatron_arguments"),
        *symbols("megatron.training.datasets.data_samplers", "MegatronPretrainingSampler"),
    ),
)

SERVED = Contract(
    "teachers from server:",
    (
        *symbols(f"{_CORE}.datasets.utils", "Split"),
        *symbols(f"{_CORE}.datasets.utils.Split", "train"),
        Use("megatron.training.training.build_pretraining_data_loader", ("dataset",)),
    ),
)

STATE_TENSORS = Wrapped(
    f"{_CORE}.ssm.mamba_mixer.make_sharded_tensors_for_checkpoint",
    ("tp_group", "dp_cp_group"),
    does="while a teacher with Mamba layers loads: its tensors are whole",
)
MEGATRON = Contract(
    "teachers from megatron:",
    (
        *symbols("megatron.training.arguments", "add_megatron_arguments"),
        *symbols("megatron.training.argument_utils", "core_transformer_config_from_args"),
        *symbols(f"{_CORE}.parallel_state", "model_parallel_is_initialized"),
        *symbols(f"{_CORE}.model_parallel_config", "ModelParallelConfig"),
        *symbols(f"{_CORE}.transformer.transformer_config", "TransformerConfig"),
        *symbols(f"{_CORE}.transformer.enums", "AttnBackend", "AttnBackend.auto"),
        *symbols(f"{_CORE}.process_groups_config", "ProcessGroupCollection"),
        *symbols(_SPECS, "HAVE_TE"),
        Use(
            f"{_SPECS}.get_gpt_decoder_block_spec",
            ("normalization", "pp_rank", "qk_l2_norm", "use_transformer_engine"),
        ),
        Use(ROUTER, attributes=("expert_bias",)),
        Use(
            f"{_SPECS}.get_gpt_layer_local_spec",
            ("multi_latent_attention", "normalization", "qk_l2_norm", "qk_layernorm"),
        ),
        Use(
            f"{_SPECS}.get_gpt_layer_with_transformer_engine_spec",
            ("multi_latent_attention", "qk_l2_norm", "qk_layernorm"),
        ),
        Use(
            GPT,
            (
                "config",
                "max_sequence_length",
                "pg_collection",
                "position_embedding_type",
                "rope_scaling",
                "rotary_base",
                "rotary_percent",
                "seq_len_interpolation_factor",
                "share_embeddings_and_output_weights",
                "transformer_layer_spec",
                "vocab_size",
            ),
        ),
        Use(
            HYBRID,
            (
                "config",
                "hybrid_layer_pattern",
                "hybrid_stack_spec",
                "max_sequence_length",
                "pg_collection",
                "position_embedding_type",
                "rotary_base",
                "rotary_percent",
                "seq_len_interpolation_factor",
                "share_embeddings_and_output_weights",
                "vocab_size",
            ),
            ("decoder", "post_process"),
        ),
        *symbols(f"{_CORE}.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"),
        STATE_TENSORS,
        *symbols(f"{_CORE}.dist_checkpointing.dict_utils", "nested_values"),
        *symbols(f"{_CORE}.dist_checkpointing.mapping", "ShardedTensor", "apply_factories"),
    ),
)

_ROWS = ("permuted_local_hidden_states", "tokens_per_expert", "permuted_probs")
FILLED_EXPERTS = Wrapped(
    f"{EXPERTS}.forward", _ROWS, does="fills up the rows of a teacher's experts, for FP8"
)
FILLED_GROUPED_EXPERTS = Wrapped(f"{GROUPED_EXPERTS}.forward", _ROWS, does=FILLED_EXPERTS.does)
IN_FP8 = Contract(
    "teachers in FP8",
    (
        FILLED_EXPERTS,
        FILLED_GROUPED_EXPERTS,
        Use(MOE_LAYER, attributes=("experts", "token_dispatcher")),
    ),
)

COMBINED = Wrapped(
    f"{MOE_LAYER}.postprocess", does="combines the outputs of the experts that imitate"
)
IMITATION = Contract(
    "imitation",
    (
        Hooked(LAYER, kind="forward hook", does="attaches the loss to a layer's states"),
        Hooked(MAMBA_LAYER, kind="forward hook", does="the same of a Mamba layer"),
        COMBINED,
        Hooked(EXPERTS, kind="forward hook", does="keeps experts' outputs for it"),
        Hooked(GROUPED_EXPERTS, kind="forward hook", does="the same of grouped experts"),
        Use(MOE_LAYER, attributes=("experts", "local_expert_indices", "token_dispatcher")),
        *symbols(
            f"{_CORE}.transformer.moe.token_dispatcher.MoETokenDispatcher",
            "combine_postprocess",
            "combine_preprocess",
            "token_combine",
        ),
        Use(f"{_CORE}.utils.make_viewless_tensor", ("keep_graph", "requires_grad")),
        Use(f"{_CORE}.transformer.utils.sharded_state_dict_default", ("tp_group",)),
    ),
)
