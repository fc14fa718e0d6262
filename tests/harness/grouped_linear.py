"""A grouped linear layer that behaves like Transformer Engine's where this package depends on it.

TE's needs a GPU. What matters here of ``te.pytorch.GroupedLinear`` and Megatron's wrappers: the
parameters' names, that the first weight alone decides whether weight gradients are made, and how
the checkpoint is laid out (the same as of one module per expert).
"""

from __future__ import annotations

import os
from functools import partial

import torch
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_moe_inject.experts.fp8.weights import is_fp8
from tests.harness.fp8_tensor import BlockwiseTensor


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, splits, rounded, *weights):
        assert len({is_fp8(weight) for weight in weights}) == 1, "TE asks the first weight alone"
        ctx.wanted = weights[0].requires_grad
        if rounded:  # the products' weights; the gradients are the parameters'
            weights = [w if is_fp8(w) else BlockwiseTensor._quantizer(w.detach()) for w in weights]
        ctx.save_for_backward(rows, *weights)
        ctx.splits = splits
        parts = zip(rows.split(splits), weights, strict=True)
        return torch.cat([part @ weight.t() for part, weight in parts])

    @staticmethod
    def backward(ctx, grad):
        rows, *weights = ctx.saved_tensors
        for weight in filter(is_fp8, weights):
            weight.update_usage(columnwise_usage=True)
        parts = list(zip(grad.split(ctx.splits), rows.split(ctx.splits), weights, strict=True))
        to_rows = torch.cat([g @ w for g, _, w in parts])
        to_weights = [g.t() @ r if ctx.wanted else None for g, r, _ in parts]
        return (to_rows, None, None, *to_weights)


class GroupedLinear(torch.nn.Module):
    """See the module. Sharded over nothing but experts."""

    def __init__(
        self, num_gemms, input_size, output_size, *, config, init_method, pg_collection, axis, **_
    ):
        super().__init__()
        self.num_gemms = num_gemms
        self.is_first_microbatch = True
        self.fuse_wgrad_accumulation = config.gradient_accumulation_fusion
        self._groups = pg_collection
        self._axis = axis
        for i in range(num_gemms):
            shape, kind = (output_size, input_size), config.params_dtype
            weight = torch.nn.Parameter(
                torch.empty(shape, dtype=kind, device=torch.cuda.current_device())
            )
            init_method(weight)
            set_tensor_model_parallel_attributes(weight, True, axis, 1)
            weight.allreduce = config.expert_model_parallel_size == 1
            self.register_parameter(f"weight{i}", weight)
        self.register_load_state_dict_pre_hook(self._drop_extra_states)

    def forward(self, x, m_splits):
        self.is_first_microbatch = False
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        rounded = bool(os.environ.get("TESTS_FP8_PRODUCTS"))
        return _GroupedProduct.apply(x, m_splits, rounded, *weights), None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        ep, state = self._groups.ep, {}
        own = self.state_dict(prefix="", keep_vars=True)
        for i in range(self.num_gemms):
            place = (
                len(sharded_offsets),
                ep.rank() * self.num_gemms + i,
                ep.size() * self.num_gemms,
            )
            one = make_sharded_tensors_for_checkpoint(
                {f"{i}.weight": own[f"weight{i}"], f"{i}._extra_state": None},
                "",
                {f"{i}.weight": self._axis},
                (*sharded_offsets, place),
                tp_group=self._groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            replace_prefix_for_sharding(one, f"{i}.", prefix)
            names = {"weight": f"weight{i}", "_extra_state": f"_extra_state{i or ''}"}
            for name, local in names.items():
                part = one[f"{i}.{name}"]
                part.replica_id = (*part.replica_id[:2], self._groups.expt_dp.rank())
                state[f"{prefix}{local}"] = part
        return state

    def get_extra_state(self):
        return None

    def set_extra_state(self, state):
        pass

    @staticmethod
    def _drop_extra_states(module, state_dict, prefix, *_):
        for i in range(1, module.num_gemms):
            state_dict.pop(f"{prefix}_extra_state{i}", None)


grouped_mlp = partial(
    TEGroupedMLP,
    submodules=GroupedMLPSubmodules(
        linear_fc1=partial(GroupedLinear, axis=0), linear_fc2=partial(GroupedLinear, axis=1)
    ),
)
"""Builder of Megatron's own ``TEGroupedMLP`` around it, as a layer specification wants one."""


def use_for_grouped_gemm() -> None:
    """From now on ``--moe-grouped-gemm`` builds it under the local specification."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.training.models import hybrid as builder

    from megatron_moe_inject.host.cpu_lane import hybrid

    stock = LocalSpecProvider.grouped_mlp_modules

    def grouped_mlp_modules(self, moe_use_grouped_gemm):
        return grouped_mlp if moe_use_grouped_gemm else stock(self, moe_use_grouped_gemm)

    LocalSpecProvider.grouped_mlp_modules = grouped_mlp_modules
    stack = hybrid.local_stack_spec()
    stack.submodules.moe_layer.submodules.mlp = get_moe_module_spec(
        use_te=False, num_experts=1, moe_grouped_gemm=True
    )
    builder.default_hybrid_stack_spec = stack
