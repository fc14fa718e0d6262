"""What adapters use of Megatron, and what they wrap."""

from megatron_moe_inject.host.contract import Contract, Hooked, Use, Wrapped, symbols
from megatron_moe_inject.host.uses import DISPATCHER, ROUTER

_LAYERS = "megatron.core.tensor_parallel.layers"
_TE_LAYERS = "megatron.core.extensions.transformer_engine"
_TE = "transformer_engine"
_ADDS = "adds the low-rank change"
_STORES = "stores the factors beside the weight"
_STATE = ("prefix", "metadata")

COLUMN_FORWARD = Wrapped(f"{_LAYERS}.ColumnParallelLinear.forward", ("input_",), does=_ADDS)
ROW_FORWARD = Wrapped(f"{_LAYERS}.RowParallelLinear.forward", ("input_",), does=_ADDS)
TE_FORWARD = Wrapped(f"{_TE_LAYERS}.TELinear.forward", ("x",), package=_TE, does=_ADDS)
TE_NORM_FORWARD = Wrapped(
    f"{_TE_LAYERS}.TELayerNormColumnParallelLinear.forward", ("x",), package=_TE, does=_ADDS
)
GROUPED_FORWARD = Wrapped(
    f"{_TE_LAYERS}.TEGroupedLinear.forward", ("x", "m_splits"), package=_TE, does=_ADDS
)
ROUTER_GATING = Wrapped(f"{ROUTER}.gating", ("input",), does=_ADDS)
LINEAR_SHARDED = Wrapped(f"{_LAYERS}.ColumnParallelLinear.sharded_state_dict", _STATE, does=_STORES)
TE_SHARDED = Wrapped(f"{_TE_LAYERS}.TELinear.sharded_state_dict", _STATE, package=_TE, does=_STORES)
GROUPED_SHARDED = Wrapped(
    f"{_TE_LAYERS}.TEColumnParallelGroupedLinear.sharded_state_dict",
    _STATE,
    package=_TE,
    does=_STORES,
)
ROUTER_SHARDED = Wrapped(f"{ROUTER}.sharded_state_dict", _STATE, does=_STORES)

_EMBEDDING = f"{_LAYERS}.VocabParallelEmbedding"
EMBEDDING_FORWARD = Wrapped(
    f"{_EMBEDDING}.forward", ("input_",), does="puts the trained rows in their places"
)
EMBEDDING_SHARDED = Wrapped(
    f"{_EMBEDDING}.sharded_state_dict", _STATE, does="stores the rows beside the matrix"
)
HEAD_SHARDED = Wrapped(
    f"{_LAYERS}.ColumnParallelLinear.sharded_state_dict",
    _STATE,
    does="stores the rows beside the matrix",
)
FINALIZE = Wrapped(
    "megatron.core.model_parallel_config.ModelParallelConfig.finalize_model_grads_func",
    does="sums the gradients of a tied student's rows over first and last stage",
)

ADAPTERS = Contract(
    "train.adapters",
    (
        COLUMN_FORWARD,
        ROW_FORWARD,
        TE_FORWARD,
        TE_NORM_FORWARD,
        LINEAR_SHARDED,
        TE_SHARDED,
        ROUTER_GATING,
        ROUTER_SHARDED,
        Hooked(
            f"{_LAYERS}.ColumnParallelLinear",
            kind="load_state_dict post-hook",
            does="a stock checkpoint lacks no factors",
        ),
        Use(f"{_LAYERS}.ColumnParallelLinear", attributes=("config", "gather_output", "weight")),
        Use(f"{_LAYERS}.RowParallelLinear", attributes=("input_is_parallel",)),
        Use(
            f"{_TE_LAYERS}.TELayerNormColumnParallelLinear",
            attributes=("return_layernorm_output", "te_return_bias"),
            package=_TE,
        ),
        *symbols(
            "megatron.core.tensor_parallel",
            "copy_to_tensor_model_parallel_region",
            "gather_from_sequence_parallel_region",
            "reduce_from_tensor_model_parallel_region",
        ),
        Use("megatron.core.tensor_parallel.reduce_scatter_to_sequence_parallel_region", ("group",)),
        *symbols("megatron.core.transformer.mlp", "apply_swiglu_sharded_factory"),
        *symbols("megatron.core.transformer.utils", "make_sharded_tensors_for_checkpoint"),
        *symbols("megatron.core.optimizer", "get_standard_config_overrides"),
        Use("megatron.core.optimizer.optimizer_config.ParamKey", ("predicate",)),
        Use("megatron.core.optimizer.optimizer_config.ParamPredicate", ("name", "fn")),
        Use("megatron.core.optimizer.get_megatron_optimizer", ("config_overrides",)),
    ),
)
GROUPED_ADAPTERS = Contract(
    "train.adapters, with --moe-grouped-gemm", (GROUPED_FORWARD, GROUPED_SHARDED)
)

_DISPATCHERS = "megatron.core.transformer.moe.token_dispatcher"
DISPATCHED = Wrapped(
    f"{DISPATCHER}.dispatch_postprocess",
    does="sends the domain of each row after the rows",
)
_KEPT = ("config", "ep_size", "hidden_shape", "reversed_local_input_permutation_mapping", "tp_size")
DOMAIN_ADAPTERS = Contract(
    "train.adapters, by: domain",
    (
        DISPATCHED,
        Use(
            f"{_DISPATCHERS}.MoEAlltoAllTokenDispatcher",
            attributes=(
                *_KEPT,
                "capacity",
                "drop_and_pad",
                "ep_group",
                "input_splits",
                "num_global_tokens_per_local_expert",
                "num_local_experts",
                "num_out_tokens",
                "output_splits",
                "output_splits_tp",
                "routing_map",
                "sort_input_by_local_experts",
                "tp_group",
            ),
        ),
        Use(
            f"{_DISPATCHERS}.MoEAllGatherTokenDispatcher",
            attributes=(*_KEPT, "local_map", "tp_ep_group"),
        ),
        *symbols("megatron.core.tensor_parallel", "all_to_all"),
        Use(
            "megatron.core.tensor_parallel.gather_from_sequence_parallel_region",
            ("group", "output_split_sizes"),
        ),
        Use("megatron.core.transformer.moe.moe_utils.permute", ("num_out_tokens", "fused")),
        Use("megatron.core.transformer.moe.moe_utils.sort_chunks_by_idxs", ("fused",)),
    ),
)

VOCABULARY_ROWS = Contract(
    "train.vocabulary_rows",
    (
        EMBEDDING_FORWARD,
        EMBEDDING_SHARDED,
        HEAD_SHARDED,
        FINALIZE,
        Hooked(
            _EMBEDDING, kind="load_state_dict post-hook", does="a stock checkpoint lacks no rows"
        ),
        Use(_EMBEDDING, attributes=("reduce_scatter_embeddings", "weight")),
        Use(
            "megatron.core.optimizer.optimizer.MegatronOptimizer.reload_model_params",
        ),
        *symbols("megatron.core.datasets.indexed_dataset", "IndexedDataset"),
        *symbols("megatron.core.tensor_parallel", "copy_to_tensor_model_parallel_region"),
        *symbols("megatron.core.transformer.utils", "make_sharded_tensors_for_checkpoint"),
    ),
)
