"""What ``retention`` uses of Megatron, and what it wraps."""

from megatron_moe_inject.host.contract import Contract, Use, Wrapped, symbols
from megatron_moe_inject.host.uses import DISPATCHER, EXPERTS, GROUPED_EXPERTS

_OPTIMIZERS = "megatron.core.optimizer"
_CHECKPOINTS = "megatron.core.dist_checkpointing"
_ROWS = ("permuted_local_hidden_states", "tokens_per_expert", "permuted_probs")

ORIGINALS = Contract(
    "originals",
    (
        *symbols(_CHECKPOINTS, "load", "save"),
        *symbols(f"{_CHECKPOINTS}.core", "CheckpointingException"),
        Use("megatron.core.tensor_parallel.gather_from_sequence_parallel_region", ("group",)),
    ),
)

L2 = Contract(
    "retention.l2",
    (
        Use(f"{_OPTIMIZERS}.optimizer.ChainedOptimizer", attributes=("chained_optimizers",)),
        Use(
            f"{_OPTIMIZERS}.optimizer.Float16OptimizerWithFloat16Params",
            attributes=("main_param",),
        ),
        Use(
            f"{_OPTIMIZERS}.distrib_optimizer.DistributedOptimizer",
            attributes=(
                "_get_model_param_range_map",
                "buffers",
                "ddp_config",
                "main_param",
                "main_param_sharded",
                "model_param_gbuf_map",
            ),
        ),
        Use(
            "megatron.core.distributed.DistributedDataParallelConfig",
            attributes=("num_distributed_optimizer_instances",),
        ),
        Use(
            "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBuffer",
            attributes=("param_index_map",),
        ),
    ),
)

DISPATCH = Wrapped(
    f"{DISPATCHER}.dispatch_preprocess", ("probs",), does="marks the gates of general tokens"
)
HELD_EXPERTS = Wrapped(
    f"{EXPERTS}.forward", _ROWS, does="compares experts' outputs with their originals'"
)
HELD_GROUPED_EXPERTS = Wrapped(f"{GROUPED_EXPERTS}.forward", _ROWS, does=HELD_EXPERTS.does)
EXPERT_RETENTION = Contract(
    "retention.experts",
    (
        DISPATCH,
        HELD_EXPERTS,
        HELD_GROUPED_EXPERTS,
        *symbols("megatron.core.tensor_parallel", "reduce_from_tensor_model_parallel_region"),
    ),
)
