"""One of Megatron's MoE layers on gloo processes, and numbers by seed."""

import torch

HIDDEN, EXPERTS, TOPK, LENGTH, BATCH = 8, 4, 2, 6, 2


def moe_layer(
    expert_parallel, dispatcher, capacity, *, pads=True, tensor_parallel=1, grouped=False
):
    """The layer, the same numbers at any expert parallelism; its groups become this process's.

    Args:
        capacity: ``moe_expert_capacity_factor``.
        pads: with a capacity, whether experts are filled up to it.
        tensor_parallel: ranks that divide each expert, and the sequence.
        grouped: experts in one module, around the stand-in for Transformer Engine's layer.
    """
    from megatron_moe_inject.host import cpu_lane

    cpu_lane.enable(force=True)
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel,
        expert_model_parallel_size=expert_parallel,
        expert_tensor_parallel_size=tensor_parallel,
    )
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        ffn_hidden_size=12,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        moe_token_dispatcher_type=dispatcher,
        moe_router_load_balancing_type="none",
        moe_expert_capacity_factor=capacity,
        moe_pad_expert_input_to_capacity=capacity is not None and pads,
        add_bias_linear=False,
        gated_linear_unit=True,
        expert_model_parallel_size=expert_parallel,
        tensor_model_parallel_size=tensor_parallel,
        expert_tensor_parallel_size=tensor_parallel,
        sequence_parallel=tensor_parallel > 1,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
    )
    if grouped:
        from tests.harness.grouped_linear import use_for_grouped_gemm

        use_for_grouped_gemm()
    spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=grouped)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer = spec(config=config, layer_number=1, pg_collection=groups)
    layer.set_layer_number(1)
    with torch.no_grad():
        layer.router.weight.copy_(random_tensor(7, EXPERTS, HIDDEN))
        for local, expert in enumerate(layer.local_expert_indices):
            for n, parameter in enumerate(_parameters(layer.experts, local, grouped)):
                if tensor_parallel == 1:  # else each rank's part is as it is made
                    parameter.copy_(random_tensor(100 * n + expert, *parameter.shape))
    return layer


def _parameters(experts, local, grouped):
    """Those of one expert of this rank."""
    if not grouped:
        return experts.local_experts[local].parameters()
    return [getattr(fc, f"weight{local}") for fc in (experts.linear_fc1, experts.linear_fc2)]


def random_tensor(seed, *shape):
    """Standard normal numbers of that shape, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
