"""What keeps as much for the backward pass as a GPU's kernels do, and computes nothing.

Megatron's own modules for machines without Transformer Engine keep what their torch operations
need: a softmax of all pairs of tokens, several copies of what a norm read, the states of each token
of a Mamba layer. A job on GPUs runs fused kernels in these three places. Here stand functions that
keep what those keep (FlashAttention, 2307.08691; the norms of TE and of torch on a GPU;
``mamba_ssm``'s ``mamba_split_conv1d_scan_combined``) and count their products.

Shapes: s sequence, b batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_moe_inject.host.megatron_types import Chunk
from megatron_moe_inject.host.wrap import Call, wrap_function, wrap_method
from megatron_moe_inject.planning.uses import CORE_FORWARD, CORE_INIT, NORM_FORWARD, SCAN


class Products:
    """Floating-point operations of the stand-ins, which torch's counter does not know.

    Args:
        context: context-parallel ranks, whose keys a rank's queries see as well.
    """

    def __init__(self, context: int = 1) -> None:
        self.flops = 0.0
        self.context = context


class _Attention(torch.autograd.Function):
    """Causal attention: keeps queries, keys, values, what it puts out, and a number a row."""

    @staticmethod
    def forward(
        ctx: Any, products: Products, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        s, b, heads, width = query.shape
        out = query.new_empty(s, b, heads, value.shape[-1])
        log_sum = query.new_empty(b, heads, s, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sum)
        ctx.products = products
        pairs = b * heads * s * key.shape[0] * products.context / 2  # causal
        ctx.flops = 2.0 * pairs * (width + value.shape[-1])
        products.flops += ctx.flops
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        ctx.products.flops += 2.5 * ctx.flops  # five products, one of them the forward's again
        return None, *(torch.empty_like(x) for x in (query, key, value))


class _Norm(torch.autograd.Function):
    """A norm of rows: keeps them and one number (of a layer norm two) of each."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, numbers: int, *weights: torch.Tensor) -> Any:
        rows = states.new_empty(numbers, *states.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(states, rows, *weights)
        return torch.empty_like(states, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        states, _, *weights = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grads = (
            torch.empty_like(w) if need else None
            for w, need in zip(weights, needed[2:], strict=True)
        )
        return torch.empty_like(states) if needed[0] else None, None, *grads


class _Scan(torch.autograd.Function):
    """Convolution and chunked scan of a Mamba-2 layer: keeps its input and what it puts out before
    the gate, and does the rest again backward (Mamba-2, 2405.21060, section 6)."""

    @staticmethod
    def forward(
        ctx: Any,
        products: Products,
        flops: float,
        inner: int,
        zxbcdt: torch.Tensor,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        read = torch.empty_like(zxbcdt)  # in the kernel's order of axes
        ungated, out = (zxbcdt.new_empty(*zxbcdt.shape[:2], inner) for _ in range(2))
        ctx.save_for_backward(read, ungated, *weights)
        ctx.products, ctx.flops = products, flops
        products.flops += flops
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        read, _, *weights = ctx.saved_tensors
        ctx.products.flops += 3 * ctx.flops  # the forward's again, and two for each product
        needed = ctx.needs_input_grad[4:]
        grads = (
            torch.empty_like(w) if need else None for w, need in zip(weights, needed, strict=True)
        )
        return None, None, None, torch.empty_like(read), *grads


def as_on_gpus(chunks: Sequence[Chunk], products: Products, *, grouped: bool = False) -> None:
    """Let attention cores, norms and Mamba layers of bare chunks keep what a GPU's kernels keep.

    Args:
        grouped: the job runs a layer's experts in grouped products. Where only some of them train,
            copies of their rows are kept (``experts.train.grouped``), not the rows of all.
    """
    from megatron.core.ssm.mamba_mixer import MambaMixer
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.moe.experts import SequentialMLP

    def attend(call: Call) -> torch.Tensor:
        out = _Attention.apply(products, call["query"], call["key"], call["value"])
        return out.reshape(*out.shape[:2], -1)

    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, DotProductAttention):
                wrap_method(module, CORE_FORWARD, attend)
            elif isinstance(module, torch.nn.RMSNorm | torch.nn.LayerNorm):
                wrap_method(module, NORM_FORWARD, functools.partial(_norm, module))
            elif isinstance(module, MambaMixer):
                wrap_method(module, SCAN, functools.partial(_scan, module, products))
            elif grouped and isinstance(module, SequentialMLP):
                _copy_rows(module)


def _norm(module: torch.nn.Module, call: Call) -> torch.Tensor:
    numbers = 2 if isinstance(module, torch.nn.LayerNorm) else 1
    return _Norm.apply(call.args[0], numbers, *module.parameters(recurse=False))


def _scan(mixer: Any, products: Products, call: Call) -> torch.Tensor:
    """``[l, b, inner]`` of ``[l, b, z x B C dt]``, with the norm behind it."""
    zxbcdt, part = call["zxBCdt"], mixer.cp
    inner, states = part.d_inner_local_tpcp, part.ngroups_local_tpcp * mixer.d_state
    # Scores of a chunk's tokens, their sum, and a state for each chunk, made and read.
    of_token = mixer.chunk_size * (states + inner) + 2 * inner * mixer.d_state
    weights = (
        *(part.get_conv1d_weight(), part.get_conv1d_bias(), part.get_dt_bias()),
        *(part.get_A_log(), part.get_D()),
    )
    tokens = zxbcdt.shape[0] * zxbcdt.shape[1]
    y = _Scan.apply(products, 2.0 * tokens * of_token, inner, zxbcdt, *weights)
    y = part.post_conv_ssm(y, call["packed_seq_params"])
    return _Norm.apply(y, 1, *mixer.norm.parameters(recurse=False)) if mixer.rmsnorm else y


def _copy_rows(experts: Any) -> None:
    """Let experts that train keep copies of their rows, where others are frozen."""
    weights = [expert.linear_fc1.weight for expert in experts.local_experts]
    if all(weight.requires_grad for weight in weights):
        return
    for expert, weight in zip(experts.local_experts, weights, strict=True):
        if weight.requires_grad:
            expert.linear_fc1.register_forward_pre_hook(_copied)


def _copied(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return inputs[0].clone(), *inputs[1:]


@contextlib.contextmanager
def any_attention(wanted: bool = True) -> Iterator[None]:
    """Inside, if wanted, Megatron's local attention core takes heads of any kind.

    Built outside Transformer Engine it refuses what multi-latent attention and context parallelism
    ask of it; it has no parameters, and ``as_on_gpus`` takes its place.
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    if not wanted:
        yield
        return
    stock = DotProductAttention.__new__
    nothing = wrap_function(CORE_INIT, _holds_nothing)
    DotProductAttention.__new__ = lambda cls, *_, **__: object.__new__(cls)
    try:
        yield
    finally:
        DotProductAttention.__new__ = stock
        nothing.remove()


def _holds_nothing(call: Call) -> None:
    torch.nn.Module.__init__(call["self"])
