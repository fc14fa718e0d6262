"""What training experts uses of Megatron, and what it wraps."""

from megatron_moe_inject.host.contract import Contract, Hooked, Use, Wrapped, symbols
from megatron_moe_inject.host.uses import (
    BLOCK,
    EXPERTS,
    GPT,
    GROUPED_EXPERTS,
    LAYER,
    MOE_LAYER,
    ROUTER,
    STACK,
)

_COMMUNICATOR = "megatron.core.pipeline_parallel.p2p_communication.P2PCommunicator"
_OPTIMIZER = "megatron.core.optimizer.optimizer"
_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
_BUFFERS = "megatron.core.distributed.param_and_grad_buffer"
_GROUPED_LINEAR = "megatron.core.extensions.transformer_engine.TEGroupedLinear"
_TE = "transformer_engine"

BOUNDARY_FORWARD = Wrapped(
    f"{BLOCK}.forward",
    ("hidden_states", "extract_layer_indices"),
    does="runs the layers below the gradient boundary without a graph",
)
HYBRID_BOUNDARY_FORWARD = Wrapped(
    f"{STACK}.forward",
    ("hidden_states",),
    does="runs the layers below the gradient boundary without a graph",
)
FROZEN_DELAYED = Wrapped(
    "megatron.core.extensions.transformer_engine.TELinear.backward_dw",
    package=_TE,
    does="with --delay-wgrad-compute: frozen layers are asked for no gradient",
)
PLANNED_BOUNDARY = Wrapped(
    f"{GPT}.build_schedule_plan",
    does="in a schedule plan: no backward below the gradient boundary",
)
FROZEN_BIAS = Wrapped(
    f"{ROUTER}._apply_expert_bias", does="frozen routers keep their bias (before 0.19)"
)
CHAIN_SHARDED = Wrapped(
    f"{_OPTIMIZER}.ChainedOptimizer.sharded_state_dict",
    does="a tensor of its own for each parameter's state",
)
STUB_STATE = Wrapped(
    f"{_OPTIMIZER}.MegatronOptimizer.state_dict", does="a part without parameters has no state"
)
STUB_LOAD = Wrapped(f"{_OPTIMIZER}.MegatronOptimizer.load_state_dict", does="... and loads none")
STUB_SHARDED = Wrapped(
    f"{_OPTIMIZER}.MegatronOptimizer.sharded_state_dict", does="... and saves none"
)
EMPTY_STATE = Wrapped(
    "torch.optim.Optimizer.state_dict", does="an empty inner optimizer tells the others' step"
)
SHARE_STATE = Wrapped(
    f"{_DISTRIBUTED}.get_parameter_state_dp_reshardable",
    does="a place of length 0 in each share without a parameter",
)
SHARE_SHARDS = Wrapped(
    f"{_DISTRIBUTED}.sharded_param_state_dp_reshardable", does="leaves these places out"
)
TRAIN = Contract(
    "train",
    (
        BOUNDARY_FORWARD,
        PLANNED_BOUNDARY,
        FROZEN_DELAYED,
        Hooked(EXPERTS, kind="forward hook", does="the graph begins at what experts put out"),
        Hooked(GROUPED_EXPERTS, kind="forward hook", does="the same of grouped experts"),
        Hooked(BLOCK, kind="forward pre-hook", does="the graph begins at a chunk's first layer"),
        FROZEN_BIAS,
        CHAIN_SHARDED,
        STUB_STATE,
        STUB_LOAD,
        STUB_SHARDED,
        EMPTY_STATE,
        SHARE_STATE,
        SHARE_SHARDS,
        Use(
            BLOCK,
            attributes=(
                "config",
                "final_layernorm",
                "input_tensor",
                "layers",
                "num_layers_per_pipeline_rank",
                "pre_process",
            ),
        ),
        Use(LAYER, attributes=("config",)),
        Use(MOE_LAYER, attributes=("moe_layer_recompute",)),
        Use(ROUTER, attributes=("expert_bias",)),
        Use(ROUTER, attributes=("frozen_expert_bias",), optional="0.19 and later"),
        Use(
            "megatron.core.transformer.transformer_config.TransformerConfig",
            attributes=(
                "cpu_offloading",
                "cuda_graph_impl",
                "delay_wgrad_compute",
                "fine_grained_activation_offloading",
                "fp8",
                "fp8_recipe",
                "recompute_granularity",
                "recompute_modules",
            ),
        ),
        Use("megatron.core.transformer.cuda_graphs.CudaGraphManager", attributes=("func",)),
        *symbols("megatron.core.fp8_utils", "get_fp8_context"),
        Use(_COMMUNICATOR, ("pp_group", "config"), ("config", "pp_group")),
        Use(f"{_COMMUNICATOR}.recv_backward", ("tensor_shapes", "is_last_stage")),
        Use(f"{_COMMUNICATOR}.send_backward", ("input_tensor_grads", "is_first_stage")),
        Use(f"{_COMMUNICATOR}.send_forward", ("output_tensors", "is_last_stage")),
        Use(
            f"{_COMMUNICATOR}.send_forward_recv_backward",
            ("output_tensors", "tensor_shapes", "is_last_stage"),
        ),
        Use(
            f"{_COMMUNICATOR}.send_backward_recv_backward",
            ("input_tensor_grad", "recv_next", "tensor_shape", "overlap_p2p_comm"),
        ),
        Use(
            f"{_COMMUNICATOR}.send_forward_backward_recv_forward_backward",
            ("output_tensor", "input_tensor_grad", "recv_prev", "recv_next", "tensor_shape"),
        ),
        *symbols("megatron.core.pipeline_parallel.schedules", "get_schedule_table"),
        *symbols("megatron.core.dist_checkpointing.mapping", "LocalNonpersistentObject"),
        Use(f"{_OPTIMIZER}.ChainedOptimizer", attributes=("chained_optimizers",)),
        Use(f"{_OPTIMIZER}.MegatronOptimizer", attributes=("optimizer",)),
        Use(
            _DISTRIBUTED,
            attributes=(
                "_get_model_param_range_map",
                "buffers",
                "data_parallel_group",
                "ddp_config",
                "gbuf_ranges",
                "model_param_gbuf_map",
            ),
        ),
        Use(f"{_BUFFERS}._ParamAndGradBuffer", attributes=("buckets", "param_index_map")),
        Use(f"{_BUFFERS}._ParamAndGradBucket", attributes=("grad_data", "offset", "params")),
    ),
)

HYBRID_TRAIN = Contract(
    "train, with --hybrid-layer-pattern",
    (
        HYBRID_BOUNDARY_FORWARD,
        Hooked(STACK, kind="forward pre-hook", does="the graph begins at a chunk's first layer"),
        Use(
            STACK,
            attributes=(
                "config",
                "input_tensor",
                "layers",
                "num_layers_per_pipeline_rank",
                "post_layer_norm",
                "post_process",
                "pre_process",
            ),
        ),
    ),
)

GROUPED_FORWARD = Wrapped(
    f"{_GROUPED_LINEAR}.forward",
    ("x", "m_splits"),
    package=_TE,
    does="makes the weight gradients of the experts that train",
)
GROUPED = Contract(
    "--moe-grouped-gemm",
    (
        GROUPED_FORWARD,
        Use(GROUPED_EXPERTS, attributes=("activation_recompute", "linear_fc1", "linear_fc2")),
    ),
)

FP8_FORWARD = Wrapped(
    f"{GROUPED_EXPERTS}.forward",
    ("permuted_local_hidden_states",),
    does="frees transposed codes after the backward pass",
)
FROZEN_FP8 = Contract(
    "train.frozen_experts: fp8",
    (
        FP8_FORWARD,
        Hooked(_GROUPED_LINEAR, package=_TE, kind="state_dict post-hook", does="decodes"),
        Hooked(_GROUPED_LINEAR, package=_TE, kind="load_state_dict pre-hook", does="encodes"),
    ),
)
