"""Weights that exist in FP8 alone, as parameters of Transformer Engine's quantised tensor types.

The only module that knows those types. A parameter keeps its codes row by row, one byte an element,
with fp32 scales beside them, and neither a copy in high precision nor a transposed one: the
transpose, which Hopper's FP8 products need for the gradient of their input, is made in a backward
pass and thrown away after it (``drop_transpose``).

Shapes: m rows, k columns; M, K blocks of ``fp8_blocks``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_moe_inject.experts.fp8 import blocks as fp8_blocks
from megatron_moe_inject.recipe.schema import FP8_SCALINGS

Fp8Tensor = Any
"""A tensor of one of Transformer Engine's quantised types, which may not be installed."""


@dataclass(frozen=True)
class Fp8Weight:
    """A weight as codes ``[m, k]`` (``float8_e4m3fn``) and decoding scales (fp32).

    Scales are ``[M, K]``, or ``[1, 1]`` for the whole weight.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """``[m, k]`` of ``dtype``, on the device of the codes."""
        return fp8_blocks.decode(self.codes, self.scales, dtype)


def encode(weight: torch.Tensor, scaling: str) -> Fp8Weight:
    """``[m, k]`` in FP8, scales powers of two, so that encoding what was decoded changes nothing.

    Args:
        scaling: one of ``FP8_SCALINGS``.
    """
    assert scaling in FP8_SCALINGS, scaling
    return Fp8Weight(*fp8_blocks.encode(weight, whole=scaling == "tensorwise"))


def parameter(weight: Fp8Weight, dtype: torch.dtype, scaling: str) -> torch.nn.Parameter:
    """A frozen parameter that is ``weight`` and passes for one of ``dtype``."""
    blocks = scaling == "blockwise"
    make = _blockwise_tensor if blocks else _scaled_tensor
    return torch.nn.Parameter(make(weight, dtype), requires_grad=False)


def is_fp8(tensor: Any) -> bool:
    """Whether a parameter keeps FP8 codes."""
    return hasattr(tensor, "_rowwise_scale_inv") or hasattr(tensor, "_scale_inv")


def stored(tensor: Fp8Tensor) -> Fp8Weight:
    """What an FP8 parameter keeps, without a copy of the codes."""
    if hasattr(tensor, "_rowwise_scale_inv"):
        codes = tensor._rowwise_data.view(fp8_blocks.CODES)
        return Fp8Weight(
            codes, tensor._rowwise_scale_inv[:, : fp8_blocks.block_shape(*codes.shape)[1]]
        )
    return Fp8Weight(tensor._data.view(fp8_blocks.CODES), tensor._scale_inv.view(1, 1))


def encoded_like(other: Fp8Tensor, values: torch.Tensor) -> Fp8Tensor:
    """``values`` as an FP8 tensor of the kind of ``other``, by TE's own quantizer.

    These are the codes by which TE multiplies where it quantises weights itself.
    """
    return other._quantizer(values.detach())


@torch.no_grad()
def overwrite(tensor: Fp8Tensor, weight: Fp8Weight) -> None:
    """Make an FP8 parameter keep ``weight``, from any device, in the memory that it has."""
    target = stored(tensor)
    target.codes.view(torch.uint8).copy_(weight.codes.view(torch.uint8))
    target.scales.copy_(weight.scales)


def drop_transpose(tensor: Fp8Tensor) -> None:
    """Free the transposed codes that a backward pass made."""
    tensor.update_usage(rowwise_usage=True, columnwise_usage=False)


def _blockwise_tensor(weight: Fp8Weight, dtype: torch.dtype) -> torch.Tensor:
    from transformer_engine.pytorch.tensor import float8_blockwise_tensor as te

    kind = _e4m3()
    quantizer = te.Float8BlockQuantizer(kind, rowwise=True, columnwise=False)
    shape = weight.codes.shape
    padded = weight.scales.new_zeros(quantizer.get_scale_shape(shape, False))
    padded[:, : weight.scales.shape[1]] = weight.scales
    return te.Float8BlockwiseQTensor(
        shape=shape,
        dtype=dtype,
        rowwise_data=weight.codes.view(torch.uint8),
        rowwise_scale_inv=padded,
        columnwise_data=None,
        columnwise_scale_inv=None,
        fp8_dtype=kind,
        quantizer=quantizer,
        is_2D_scaled=True,
        requires_grad=False,
    )


def _scaled_tensor(weight: Fp8Weight, dtype: torch.dtype) -> torch.Tensor:
    from transformer_engine.pytorch.tensor import float8_tensor as te

    kind, device = _e4m3(), weight.codes.device
    quantizer = te.Float8CurrentScalingQuantizer(kind, device, rowwise=True, columnwise=False)
    return te.Float8Tensor(
        shape=weight.codes.shape,
        dtype=dtype,
        data=weight.codes.view(torch.uint8),
        fp8_scale_inv=weight.scales.reshape(1),
        fp8_dtype=kind,
        quantizer=quantizer,
        requires_grad=False,
    )


def _e4m3() -> Any:
    import transformer_engine_torch

    return transformer_engine_torch.DType.kFloat8E4M3
