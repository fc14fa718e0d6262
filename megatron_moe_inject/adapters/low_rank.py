"""The low-rank change of one linear layer: what is added to its output, at any division of it.

out = W x + s B (A x), with A ``[r, n]`` and B ``[k, r]`` of a weight W ``[k, n]`` (LoRA, 2106.09685).
A begins gaussian with standard deviation n^-0.5, drawn for the whole matrix by its global name, so
that it is the same at every layout; B begins as zero, so that the model is the original.

A matrix may be divided over tensor-parallel ranks by its outputs (a column-parallel layer), by its
inputs (row-parallel), or not (whole). Then one factor is divided like it and the other is whole on
every rank. What travels is r wide:

| W | A | B | forward | gradient of the whole factor |
|---|---|---|---|---|
| column | whole | ``[k/p, r]`` | A x is gathered (sequence parallelism) | each rank has its part of the sequence's, or all of it |
| row | ``[r, n/p]`` | whole | A x is reduced, or reduce-scattered | the same |
| whole | whole | whole | nothing | the same |

Megatron sums what is marked ``sequence_parallel`` once a step. An expert's matrix that is divided
(expert tensor parallelism) gets and gives partial sums, which the dispatcher reduces: there the
whole factor's gradient is summed in its backward pass.

Shapes: l this rank's part of the sequence, b samples, n inputs, k outputs, r rank, p ranks.
"""  # noqa: E501

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_moe_inject.adapters.blocks import (
    OfDomain,
    joined,
    label_tensor,
    of_own_domain,
    suffixes,
)
from megatron_moe_inject.host import compat

COLUMN, ROW, WHOLE = "column", "row", "whole"


@dataclass(frozen=True)
class Sharding:
    """How a linear layer is divided.

    Attributes:
        kind: ``column``, ``row`` or ``whole``.
        group: the tensor-parallel ranks that divide it.
        sequence: whether its input (column, whole) or output (row) is a part of the sequence.
        expert: whether it is an expert's, whose partial sums the dispatcher reduces.
    """

    kind: str
    group: dist.ProcessGroup
    sequence: bool = False
    expert: bool = False

    @property
    def size(self) -> int:
        """Ranks that divide the matrix."""
        return 1 if self.kind == WHOLE else self.group.size()


def factors(
    weight: torch.Tensor, rank: int, sharding: Sharding, name: str
) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """A and B of a weight's part on this rank, as they begin, marked for Megatron. No collective.

    Args:
        weight: ``[k/p, n]``, ``[k, n/p]`` or ``[k, n]``; device, dtype and data-parallel group
            (``allreduce``) are its own.
        name: the whole matrix's, with global numbers.
    """
    outputs, inputs = weight.shape
    if sharding.kind == ROW:
        inputs *= sharding.size
    if weight.is_meta:
        a = torch.empty(rank, inputs, device="meta")
    else:
        drawn = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        a = torch.randn(rank, inputs, generator=drawn) * inputs**-0.5
    if sharding.kind == ROW:
        a = a.chunk(sharding.size, dim=1)[sharding.group.rank()]
    first = torch.nn.Parameter(a.to(weight.device, weight.dtype).contiguous())
    zeros = torch.zeros(outputs, rank, device=weight.device, dtype=weight.dtype)
    second = torch.nn.Parameter(zeros)
    divided = {COLUMN: second, ROW: first}.get(sharding.kind)
    for parameter in (first, second):
        marks: dict[str, Any] = {
            "allreduce": getattr(weight, "allreduce", True),
            "tensor_model_parallel": parameter is divided and sharding.size > 1,
            "sequence_parallel": sharding.sequence and parameter is not divided,
        }
        if marks["tensor_model_parallel"]:
            marks |= {"partition_dim": 0 if parameter is second else 1, "partition_stride": 1}
        for mark, value in marks.items():
            setattr(parameter, mark, value)
    return first, second


class LowRank(torch.nn.Module):
    """The change of one layer's output. A module, whose call runs the pre-hooks of Megatron's DDP.

    Args:
        weight: the layer's.
        rank: r.
        scale: s.
        sharding: how the layer is divided.
        name: the whole matrix's, with global numbers.
        domains: which have factors of their own (``blocks``); none = one pair for all tokens.

    Attributes:
        on: whether it acts.
        labels: with domains, those of the blocks, ``[D]``.
    """

    labels: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        rank: int,
        scale: float,
        sharding: Sharding,
        name: str,
        domains: Sequence[OfDomain] = (),
    ) -> None:
        super().__init__()
        self._blocks = [suffix for suffix, _ in suffixes(domains)]
        for suffix, drawn_by in suffixes(domains):
            pair = factors(weight, rank, sharding, name + drawn_by)
            for factor, parameter in zip("ab", pair, strict=True):
                self.register_parameter(factor + suffix, parameter)
        if domains:
            labels = label_tensor(domains, weight.device)
            self.register_buffer("labels", labels, persistent=False)
        self.scale = scale
        self.on = True
        self._sharding = sharding

    def forward(self, x: torch.Tensor, token_labels: torch.Tensor | None = None) -> torch.Tensor:
        """What is added to the output of an input as the layer gets it, ``[l, b, n]`` or, of an
        expert, ``[tokens, n]``.

        Args:
            token_labels: with ``domains``, the domain of each token ``[l, b]`` or ``[tokens]``: of
                the input, or of the output of a matrix that is divided by its inputs.

        Collectives: with p > 1 one of a tensor r wide (with D domains D r) over the group, and one
        in the backward pass.
        """
        sharding = self._sharding
        a, b = whole_summed(*joined([self._pair(suffix) for suffix in self._blocks]), sharding)
        hidden = F.linear(x, a) * self.scale
        travels = sharding.size > 1 and not sharding.expert
        if travels and sharding.kind == ROW:
            hidden = _travelled(hidden, sharding)
        if token_labels is not None:
            hidden = of_own_domain(hidden, token_labels, self.labels)
        if travels and sharding.kind != ROW:
            hidden = _travelled(hidden, sharding)
        return F.linear(hidden, b)

    def _pair(self, suffix: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.get_parameter(f"a{suffix}"), self.get_parameter(f"b{suffix}")

    def of_head(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """A, B and s of an output layer for the loss (``losses.LowRankHead``); ``None`` while they
        are off. No collective."""
        if not self.on:
            return None
        compat.run_forward_pre_hooks(self)
        return *self._pair(""), self.scale


def _travelled(hidden: torch.Tensor, sharding: Sharding) -> torch.Tensor:
    """A x where B takes it."""
    from megatron.core import tensor_parallel as tp

    group = sharding.group
    if sharding.kind == COLUMN:
        if sharding.sequence:
            return tp.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=group
            )
        return tp.copy_to_tensor_model_parallel_region(hidden, group=group)
    if sharding.sequence:
        return tp.reduce_scatter_to_sequence_parallel_region(hidden, group=group)
    return tp.reduce_from_tensor_model_parallel_region(hidden, group=group)


def whole_summed(
    a: torch.Tensor, b: torch.Tensor, sharding: Sharding
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of an expert whose matrix is divided, the whole one with a summed gradient; of
    any other matrix as they are.

    Collectives: one all-reduce of the whole factor's size over the group in the backward pass.
    """
    from megatron.core import tensor_parallel as tp

    if sharding.size == 1 or not sharding.expert:
        return a, b
    summed = functools.partial(
        tp.copy_to_tensor_model_parallel_region, group=sharding.group
    )  # identity forward, all-reduce backward
    return (summed(a), b) if sharding.kind == COLUMN else (a, summed(b))
