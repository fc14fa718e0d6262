"""A tensor that behaves like Transformer Engine's quantised ones where this package depends on it.

TE's need a GPU. What matters here of ``Float8BlockwiseQTensor``: it passes for a tensor of the
parameters' dtype, keeps codes and scales under the names below, is decoded by every operation that
does not know it, makes its transpose where a backward pass asks for it, and drops it on request.
"""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_map

from megatron_moe_inject.experts.fp8 import blocks as fp8_blocks
from megatron_moe_inject.experts.fp8 import weights as fp8_weights


class BlockwiseTensor(torch.Tensor):
    """See the module. Made by ``blockwise_tensor``."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype):
        tensor = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype)
        tensor._rowwise_data, tensor._rowwise_scale_inv = codes, scales
        tensor._columnwise_data = None
        return tensor

    @staticmethod
    def _quantizer(values):
        encoded = fp8_weights.encode(values, "blockwise")
        return BlockwiseTensor(encoded.codes.view(torch.uint8), encoded.scales, values.dtype)

    def decoded(self) -> torch.Tensor:
        codes = self._rowwise_data.view(fp8_blocks.CODES)
        return fp8_blocks.decode(codes, self._rowwise_scale_inv, self.dtype)

    def update_usage(self, rowwise_usage=None, columnwise_usage=None):
        if columnwise_usage:
            self._columnwise_data = self._rowwise_data.t().contiguous()
        elif columnwise_usage is False:
            self._columnwise_data = None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            own = args[0]
            return cls(own._rowwise_data, own._rowwise_scale_inv, own.dtype)
        if func is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            own, other = args[:2]
            assert isinstance(other, cls), "a plain tensor would have to be quantised on a GPU"
            own._rowwise_data.copy_(other._rowwise_data)
            own._rowwise_scale_inv.copy_(other._rowwise_scale_inv)
            return own

        def plain(value):
            return value.decoded() if isinstance(value, cls) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def use_for_frozen_experts() -> None:
    """From now on frozen experts in FP8 are made of it."""

    def blockwise_tensor(weight, dtype):
        return BlockwiseTensor(weight.codes.view(torch.uint8), weight.scales.clone(), dtype)

    fp8_weights._blockwise_tensor = blockwise_tensor
