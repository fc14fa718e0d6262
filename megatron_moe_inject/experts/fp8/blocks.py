"""Weights as FP8 (E4M3) codes with one scale for each block of 128 x 128, and back.

The layout of DeepSeek-V3's published weights (arXiv 2412.19437, section 3.3) and of Transformer
Engine's ``Float8BlockScaling``. With scales that are powers of two, decoding to bfloat16 is exact,
and encoding what was decoded gives the same values: such weights survive a bfloat16 checkpoint
bitwise. Other scales, as DeepSeek-V3's own, are decoded with one rounding to bfloat16.

Pure torch on any device. Shapes: m rows, k columns, M = ceil(m / 128), K = ceil(k / 128) blocks.
"""

from __future__ import annotations

import torch

BLOCK = 128
CODES = torch.float8_e4m3fn
LARGEST = torch.finfo(CODES).max
"""448, the largest finite code."""


def encode(
    weight: torch.Tensor, *, whole: bool = False, power_of_two: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[m, k]`` (``float8_e4m3fn``) and decoding scales ``[M, K]`` (fp32) of ``[m, k]``.

    The largest magnitude of a block becomes the largest code, or with ``power_of_two`` one of the
    codes from half of it on. A block of zeros has scale 1. The same numbers as Transformer Engine's
    ``Float8BlockQuantizer`` gives. With ``whole`` the weight is one block, scales are ``[1, 1]``.
    """
    tiles = weight.float()[None, :, None, :] if whole else _tiles(weight.float())
    amax = tiles.abs().amax(dim=(1, 3))
    scale = torch.where(amax > 0, LARGEST / amax, torch.ones_like(amax))
    scale = scale.clamp(max=torch.finfo(torch.float32).max)
    if power_of_two:
        _, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - 1)
    codes = (tiles * scale[:, None, :, None]).clamp(-LARGEST, LARGEST).to(CODES)
    return _untiled(codes, weight.shape), scale.reciprocal()


def codes_of(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes ``[m, k]`` of ``[m, k]`` for decoding scales ``[M, K]`` (fp32) that are given."""
    tiles = _tiles(weight.float()) / scales[:, None, :, None]
    return _untiled(tiles.clamp(-LARGEST, LARGEST).to(CODES), weight.shape)


def decode(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[m, k]`` of ``dtype`` from codes ``[m, k]`` and scales ``[M, K]`` or ``[1, 1]``."""
    if scales.numel() == 1:
        return (codes.float() * scales).to(dtype)
    tiles = _tiles(codes.float()) * scales[:, None, :, None]
    return _untiled(tiles.to(dtype), codes.shape)


def same_blocks(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Bool ``[M, K]``: the blocks in which both ``[m, k]`` are equal."""
    return _tiles((one != other).to(torch.uint8)).sum(dim=(1, 3)) == 0


def by_element(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """``[m, k]`` of ``[M, K]``, each entry repeated over its block."""
    m, k = shape
    return blocks.repeat_interleave(BLOCK, 0)[:m].repeat_interleave(BLOCK, 1)[:, :k]


def block_shape(m: int, k: int) -> tuple[int, int]:
    """``(M, K)``."""
    return -(-m // BLOCK), -(-k // BLOCK)


def _tiles(matrix: torch.Tensor) -> torch.Tensor:
    """``[M, 128, K, 128]``, padded with zeros."""
    m, k = matrix.shape
    rows, columns = block_shape(m, k)
    padded = torch.nn.functional.pad(matrix, (0, columns * BLOCK - k, 0, rows * BLOCK - m))
    return padded.view(rows, BLOCK, columns, BLOCK)


def _untiled(tiles: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    m, k = shape
    whole = tiles.reshape(tiles.shape[0] * tiles.shape[1], tiles.shape[2] * tiles.shape[3])
    return whole[:m, :k].contiguous()
