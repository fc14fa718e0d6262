"""Megatron's arguments as the planner builds with them: without what needs a GPU.

What is set here changes kernels, overlap and logging, and the number of parameters not at all.
Where it changes what is held in memory, ``estimated`` says so, and the plan repeats it.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from typing import Any

_OFF: dict[str, Any] = {
    **dict.fromkeys(
        (
            *(
                "apply_layernorm_1p",
                "apply_rope_fusion",
                "async_save",
                "check_for_nan_in_loss_and_grad",
            ),
            *("cross_entropy_loss_fusion", "delay_wgrad_compute", "deterministic_mode"),
            *(
                "enable_cuda_graph",
                "exit_signal_handler",
                "external_cuda_graph",
                "fp8_param_gather",
            ),
            *("gradient_accumulation_fusion", "inference_rng_tracker", "masked_softmax_fusion"),
            *("memory_efficient_layer_norm", "moe_enable_deepep", "moe_grouped_gemm"),
            *("moe_permute_fusion", "moe_router_fusion", "moe_shared_expert_overlap"),
            *("overlap_moe_expert_parallel_comm", "perform_initialization", "te_rng_tracker"),
            *("tp_comm_overlap", "use_cpu_initialization", "use_gloo_process_groups"),
            *("use_precision_aware_optimizer", "use_te_activation_func", "log_straggler"),
            *("fine_grained_activation_offloading", "cpu_offloading", "optimizer_cpu_offload"),
            *(
                "moe_router_padding_for_quantization",
                "moe_router_padding_for_fp8",
                "use_sharp",
                "qk_clip",
            ),
        ),
        False,
    ),
    **dict.fromkeys(
        ("fp4", "fp8", "load", "pretrained_checkpoint", "save", "tensorboard_dir", "wandb_project"),
        None,
    ),
    "cuda_graph_impl": "none",
    "distributed_backend": "gloo",
    "fake_process_group": True,
    "init_model_with_meta_device": True,
    "moe_token_dispatcher_type": "alltoall",
    "no_persist_layer_norm": True,
    "transformer_impl": "local",
}
"""Argument -> what it is for the planner."""

_STATIC_ROUTING = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
"""Every expert gets its share of the tokens, so that shapes are known without values."""


_FLOAT32 = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
"""Types of Transformer Engine's optimizer; its state is counted apart (``stage.StateBytes``)."""

_OUTPUTS = ("layernorm", "mla_up_proj", "moe_act")
"""Among ``--recompute-modules``, those whose output alone is freed, by a function of Megatron's
that needs Transformer Engine and takes the storage from under a tensor."""


def relaxed(args: Namespace) -> Namespace:
    """A copy of parsed, not yet validated arguments that can be built with anywhere."""
    args = copy.deepcopy(args)
    for name, value in _OFF.items():
        if hasattr(args, name):
            setattr(args, name, value)
    for name in _FLOAT32:
        setattr(args, name, "fp32")
    if set(args.recompute_modules or ()) & set(_OUTPUTS):
        args.recompute_modules = [m for m in args.recompute_modules if m not in _OUTPUTS]
        if not args.recompute_modules:
            args.recompute_granularity = None
    if getattr(args, "num_experts", None):
        if args.moe_expert_capacity_factor is None:
            args.moe_expert_capacity_factor = _STATIC_ROUTING["moe_expert_capacity_factor"]
        args.moe_pad_expert_input_to_capacity = True
    return args


def estimated(args: Namespace) -> list[str]:
    """What of these arguments the planner does not reproduce byte for byte, one sentence each."""
    remarks = []
    if args.num_experts and args.moe_expert_capacity_factor is None:
        remarks.append("activations: every expert is taken to get the same number of tokens")
    if getattr(args, "fp8", None):
        remarks.append(
            "FP8: two bytes more for each weight that layers multiply by (its codes and their "
            "transpose); inputs of linear layers are counted in bf16"
        )
    outputs = [name for name in args.recompute_modules or () if name in _OUTPUTS]
    if outputs:
        remarks.append(f"--recompute-modules {' '.join(outputs)}: counted as if it stayed")
    if args.moe_token_dispatcher_type not in (None, "alltoall"):
        remarks.append(
            f"--moe-token-dispatcher-type {args.moe_token_dispatcher_type}: activations are those "
            "of alltoall; its communication buffers are not counted"
        )
    for name, what in (
        ("overlap_moe_expert_parallel_comm", "one micro-batch more is in flight, counted so"),
        ("fine_grained_activation_offloading", "activations are counted as if they stayed"),
        ("cpu_offloading", "activations are counted as if they stayed"),
        ("optimizer_cpu_offload", "the optimizer is counted as if it stayed on the GPU"),
    ):
        if getattr(args, name, False):
            remarks.append(f"--{name.replace('_', '-')}: {what}")
    cuda_graphs = getattr(args, "cuda_graph_impl", None) or "none"
    if cuda_graphs != "none":
        remarks.append(f"--cuda-graph-impl {cuda_graphs}: the graphs' own memory is not counted")
    return remarks
