"""What keeps as much for the backward pass as a GPU's kernels do, and computes nothing.

Megatron's own modules for machines without Transformer Engine keep what their torch operations
need: a softmax of all pairs of tokens, several copies of what a norm read. A job on GPUs runs fused
kernels in these two places. Here stand functions that keep what those keep (FlashAttention 2, 2.1 of
arXiv 2307.08691; TE's and torch's norms) and count their products. Shapes: s sequence, b batch, a
heads, d and dv width of a head's keys and values, h hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_moe_inject.host.megatron_types import Chunk


class Products:
    """Floating-point operations of the stand-ins, which torch's counter does not know."""

    def __init__(self) -> None:
        self.flops = 0.0


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
        ctx.flops = float(b * heads * s * key.shape[0] * (width + value.shape[-1]))
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


def as_on_gpus(chunks: Sequence[Chunk], products: Products) -> None:
    """Let the attention cores and norms of bare chunks keep what a GPU's kernels keep."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any):
        out = _Attention.apply(products, query, key, value)
        return out.reshape(*out.shape[:2], -1)

    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, DotProductAttention):
                module.forward = attend
            elif isinstance(module, torch.nn.RMSNorm | torch.nn.LayerNorm):
                module.forward = _norm(module)


def _norm(module: torch.nn.Module) -> Any:
    numbers = 2 if isinstance(module, torch.nn.LayerNorm) else 1

    def forward(states: torch.Tensor) -> torch.Tensor:
        return _Norm.apply(states, numbers, *module.parameters(recurse=False))

    return forward


@contextlib.contextmanager
def any_attention(wanted: bool = True) -> Iterator[None]:
    """Inside, if wanted, Megatron's local attention core takes heads of any kind, and holds nothing.

    Built outside Transformer Engine it refuses what multi-latent attention and context parallelism
    ask of it; it has no parameters, and ``as_on_gpus`` takes its place.
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    if not wanted:
        yield
        return
    stock = DotProductAttention.__init__

    def init(self: torch.nn.Module, *_: Any, **__: Any) -> None:
        torch.nn.Module.__init__(self)

    DotProductAttention.__init__ = init
    try:
        yield
    finally:
        DotProductAttention.__init__ = stock
