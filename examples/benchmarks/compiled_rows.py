"""The row maths of the losses under ``torch.compile``: what the Triton kernels have to beat.

Shapes: t tokens (rows), c columns of a rank. The torch operations of ``losses/rows.py``, compiled
over all rows at once, where the plain path works through blocks.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_moe_inject.losses import rows as row_maths
from megatron_moe_inject.losses.rows import LogitRows, Scratch


class CompiledRows:
    """``rows.RowKernels`` by ``torch.compile``, for any device and numbers of rows."""

    def __init__(self) -> None:
        self._local_statistics = torch.compile(_local_statistics)
        self._mixture_terms = torch.compile(row_maths.mixture_terms)
        self._gradient = torch.compile(_gradient)

    def local_statistics(self, logits, divergence, shard, weighting) -> dict[str, Tensor]:
        logits, shard = _traceable(logits, shard)
        return self._local_statistics(logits, divergence, shard, weighting)

    def mixture_terms(self, logits, stats, divergence) -> Tensor:
        return self._mixture_terms(_traceable(logits)[0], stats, divergence)

    def logit_gradient(self, logits, stats, divergence, shard, kd_weight, ce_weight, out) -> None:
        logits, shard = _traceable(logits, shard)
        self._gradient(logits, stats, divergence, shard, kd_weight, ce_weight, out)


def _traceable(logits, shard=None):
    """Without what the compiler should not see: itself and the process group."""
    return replace(logits, kernels=None), shard and replace(shard, group=None)


def _scratch(logits: LogitRows) -> Scratch:
    return Scratch(logits, [slice(0, len(logits.x))])


def _local_statistics(logits, divergence, shard, weighting) -> dict[str, Tensor]:
    scratch = _scratch(logits)
    return row_maths.local_statistics(logits, divergence, shard, weighting, scratch)


def _gradient(logits, stats, divergence, shard, kd_weight, ce_weight, out) -> None:
    out.copy_(
        row_maths.block_gradient(
            logits, stats, divergence, shard, kd_weight, ce_weight, _scratch(logits)
        )
    )
