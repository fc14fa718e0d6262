"""How a published tensor is stored: plain, in FP8 by blocks, or in MXFP4.

A storage knows by which names a logical tensor stands in the folder's files, gives its values, and
makes the stored tensors of new values. What is encoded again keeps every block whose values are the
old ones: its codes and its scale stay bit for bit, so that a change of one expert in a tensor of
all experts changes no other's bytes.

FP8 by blocks: ``X`` (E4M3) and ``X_scale_inv``, a scale for each 128 x 128 (DeepSeek-V3's
README_WEIGHTS; Qwen3's FP8 models keep the scales in bfloat16). MXFP4: ``X_blocks`` and
``X_scales``, two E2M1 codes in a byte, a power of two for each 32 along the input (OCP Microscaling
Formats 1.0); the matrices stand there as ``[output, input]``, while the tensor ``X`` that
``transformers`` knows is ``[input, output]``, and so is the logical one here.

Shapes: ``...`` leading axes (experts), m rows, k columns, M and K blocks of them, G = k / 32.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch

from megatron_moe_inject.experts.fp8 import blocks as fp8_blocks

GROUP = 32
"""Values that share a scale in MXFP4."""

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LARGEST_FP4 = 6.0
_BIAS = 127

Pieces = Mapping[str, torch.Tensor]
"""What is stored of a logical tensor, by the ending of its name there."""


class Storage(Protocol):
    """One way to store a tensor.

    Attributes:
        kind: "plain", "fp8" or "mxfp4".
        endings: what is added to the logical name, for each stored tensor; the first one's file
            is where the tensor belongs.
    """

    kind: str
    endings: tuple[str, ...]

    def dtype(self, stored: Mapping[str, torch.dtype]) -> torch.dtype:
        """Logical type, given those of the stored tensors by ending."""
        ...

    def shape(self, stored: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
        """Logical shape, given the stored tensors' by ending; ``None`` where they do not fit."""
        ...

    def decode(self, pieces: Pieces, dtype: torch.dtype) -> torch.Tensor:
        """The values, rounded to ``dtype`` once. Pieces may be slices on their leading axes."""
        ...


@runtime_checkable
class Quantised(Storage, Protocol):
    """A storage whose tensors are codes and scales."""

    def encode(self, value: torch.Tensor, old: Pieces) -> dict[str, torch.Tensor]:
        """What is to be stored for ``value``, in the types of ``old``; blocks in which ``old``,
        decoded to the type of ``value``, equals it are those of ``old``."""
        ...


class Plain(Storage):
    """The tensor itself."""

    kind = "plain"
    endings = ("",)

    def dtype(self, stored: Mapping[str, torch.dtype]) -> torch.dtype:
        return stored[""]

    def shape(self, stored: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
        return stored[""]

    def decode(self, pieces: Pieces, dtype: torch.dtype) -> torch.Tensor:
        return pieces[""].to(dtype)


class Fp8Blocks(Quantised):
    """E4M3 codes ``[..., m, k]`` and decoding scales ``[..., M, K]``.

    Args:
        power_of_two: whether scales are powers of two (``scale_fmt`` ue8m0).
    """

    kind = "fp8"
    codes, scales = "", "_scale_inv"
    endings = (codes, scales)

    def __init__(self, power_of_two: bool = False) -> None:
        self._power_of_two = power_of_two

    def dtype(self, stored: Mapping[str, torch.dtype]) -> torch.dtype:
        return torch.bfloat16

    def shape(self, stored: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
        codes, scales = stored[self.codes], stored[self.scales]
        if len(codes) < 2 or scales != (*codes[:-2], *fp8_blocks.block_shape(*codes[-2:])):
            return None
        return codes

    def decode(self, pieces: Pieces, dtype: torch.dtype) -> torch.Tensor:
        codes, scales = pieces[self.codes], pieces[self.scales]
        out = torch.empty(codes.shape, dtype=dtype)
        for matrix, code, scale in zip(_flat(out), _flat(codes), _flat(scales), strict=True):
            matrix.copy_(fp8_blocks.decode(code, scale.float(), dtype))
        return out

    def encode(self, value: torch.Tensor, old: Pieces) -> dict[str, torch.Tensor]:
        codes, scales = old[self.codes].clone(), old[self.scales].clone()
        for matrix, code, scale in zip(_flat(value), _flat(codes), _flat(scales), strict=True):
            same = fp8_blocks.same_blocks(
                fp8_blocks.decode(code, scale.float(), value.dtype), matrix
            )
            if same.all():
                continue
            new_codes, new_scales = self._encoded(matrix, scale.dtype)
            within = fp8_blocks.by_element(same, matrix.shape)
            # torch.where has no kernel for FP8; bytes are bytes.
            code.view(torch.uint8).copy_(
                torch.where(within, code.view(torch.uint8), new_codes.view(torch.uint8))
            )
            scale.copy_(torch.where(same, scale.float(), new_scales.float()).to(scale.dtype))
        return {self.codes: codes, self.scales: scales}

    def _encoded(
        self, matrix: torch.Tensor, scale_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        power_of_two = self._power_of_two or scale_dtype == torch.float8_e8m0fnu
        codes, scales = fp8_blocks.encode(matrix, power_of_two=power_of_two)
        stored = scales.to(scale_dtype)
        if not torch.equal(stored.float(), scales):
            codes = fp8_blocks.codes_of(matrix, stored.float())
        return codes, stored


class Mxfp4(Quantised):
    """Codes ``[..., m, G, 16]`` and exponents ``[..., m, G]``, both uint8, of ``[..., k, m]``."""

    kind = "mxfp4"
    codes, scales = "_blocks", "_scales"
    endings = (codes, scales)

    def dtype(self, stored: Mapping[str, torch.dtype]) -> torch.dtype:
        return torch.bfloat16

    def shape(self, stored: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
        codes, scales = stored[self.codes], stored[self.scales]
        if len(codes) < 3 or codes != (*scales, GROUP // 2):
            return None
        *leading, m, groups = scales
        return (*leading, groups * GROUP, m)

    def decode(self, pieces: Pieces, dtype: torch.dtype) -> torch.Tensor:
        codes, scales = pieces[self.codes], pieces[self.scales]
        *leading, m, groups = scales.shape
        out = torch.empty((*leading, groups * GROUP, m), dtype=dtype)
        matrices = (_flat(out), _flat(codes, 3), _flat(scales))
        for matrix, code, scale in zip(*matrices, strict=True):
            matrix.copy_(_decoded(code, scale, dtype).flatten(1).T)
        return out

    def encode(self, value: torch.Tensor, old: Pieces) -> dict[str, torch.Tensor]:
        codes, scales = old[self.codes].clone(), old[self.scales].clone()
        matrices = (_flat(value), _flat(codes, 3), _flat(scales))
        for matrix, code, scale in zip(*matrices, strict=True):
            rows = matrix.T.unflatten(1, (-1, GROUP))
            same = (_decoded(code, scale, value.dtype) == rows).all(-1)
            if same.all():
                continue
            new_codes, new_scales = _encoded(rows.float())
            code.copy_(torch.where(same[..., None], code, new_codes))
            scale.copy_(torch.where(same, scale, new_scales))
        return {self.codes: codes, self.scales: scales}


def _flat(tensor: torch.Tensor, axes: int = 2) -> torch.Tensor:
    """With its leading axes joined to one: a view."""
    return tensor[None] if tensor.ndim == axes else tensor.flatten(0, tensor.ndim - axes - 1)


@functools.cache
def _pairs(dtype: torch.dtype) -> torch.Tensor:
    """The two values of each byte, the low half's first, ``[256]`` as one integer of both."""
    values = torch.tensor([*_FP4, *(-value for value in _FP4)], dtype=dtype)
    byte = torch.arange(256)
    pairs = torch.stack([values[byte & 15], values[byte >> 4]], dim=1)
    return pairs.view({2: torch.int32, 4: torch.int64}[dtype.itemsize]).flatten()


def _decoded(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[m, G, 32]`` of ``[m, G, 16]`` and ``[m, G]``."""
    exact = dtype if dtype in (torch.bfloat16, torch.float32) else torch.float32
    values = _pairs(exact)[codes.int()].view(exact)
    factors = torch.ldexp(torch.ones(()), scales.int() - _BIAS).to(exact)
    return values.mul_(factors[..., None]).to(dtype)


def _encoded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[m, G, 16]`` and exponents ``[m, G]`` of fp32 ``[m, G, 32]``.

    The scale is the smallest power of two by which no value is beyond 6, the largest code; values
    are rounded to the nearest code, ties to the even one. A group of zeros has scale 1.
    """
    amax = rows.abs().amax(-1)
    fraction, exponent = torch.frexp(amax / _LARGEST_FP4)
    exponent = exponent - (fraction == 0.5).int()  # amax / 6 <= 2 ** exponent
    exponent = torch.where(amax > 0, exponent, 0).clamp(-_BIAS, _BIAS)
    scaled = rows.abs() * torch.ldexp(torch.ones(()), -exponent)[..., None]
    # Codes 0 to 4 are 0.5 apart, 4 to 6 by 1, 6 and 7 by 2; torch rounds ties to even numbers.
    above = torch.where(scaled < 4, scaled.round() + 2, (scaled / 2).round() + 4)
    codes = torch.where(scaled < 2, (2 * scaled).round(), above).clamp_(max=7).to(torch.uint8)
    codes |= rows.signbit().to(torch.uint8) << 3
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed, (exponent + _BIAS).to(torch.uint8)
