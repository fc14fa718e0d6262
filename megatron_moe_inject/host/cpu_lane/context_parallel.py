"""Core attention under context parallelism, for the local spec.

Stock local attention refuses more than one context-parallel rank. Here each rank gathers the
keys and values of the whole sequence and attends from its own queries: two all-gathers forward
and two reduce-scatters backward per layer, and full-length K, V and score rows in memory.
Transformer Engine's ring overlaps and saves that memory; the result is the same.

Shapes: s sequence, c context-parallel size, b batch, n heads and g key groups of this tensor
rank, d head size. Megatron cuts the sequence into 2c chunks; rank r holds chunks r and 2c-1-r.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_moe_inject.host.megatron_types import Config


def zigzag_positions(cp_size: int, length: int) -> torch.Tensor:
    """Position in the sequence of each token, ranks concatenated: ``[c, s/c]`` int64."""
    chunks = torch.arange(length).view(2 * cp_size, -1)
    return torch.stack(
        [torch.cat((chunks[rank], chunks[2 * cp_size - 1 - rank])) for rank in range(cp_size)]
    )


class ContextParallelAttention(DotProductAttention):
    """Local attention of this rank's queries over the keys and values of the whole sequence."""

    def __init__(
        self,
        config: Config,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        super().__init__(alone, layer_number, attn_mask_type, *args, **kwargs)
        self.config = config
        assert self.scale_mask_softmax.window_size is None
        assert attn_mask_type is AttnMaskType.causal, "only causal attention is sliced zigzag"
        group = getattr(self.pg_collection, "cp", None)
        self.cp_group = parallel_state.get_context_parallel_group() if group is None else group

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``[s/c, b, n, d]`` queries, ``[s/c, b, g, d]`` keys and values -> ``[s/c, b, n*d]``.

        ``attention_mask`` (true = hidden) is ``[b, 1, s/c, s]`` or None; tokens after the query
        are hidden in any case. Two all-gathers of K and V over the context-parallel group, two
        reduce-scatters in backward.
        """
        assert packed_seq_params is None
        cp_size, rank = self.cp_group.size(), self.cp_group.rank()
        positions = zigzag_positions(cp_size, key.size(0) * cp_size).to(key.device)
        in_order = positions.flatten().argsort()
        key, value = (
            gather_from_sequence_parallel_region(x, group=self.cp_group).index_select(0, in_order)
            for x in (key, value)
        )
        order = torch.arange(positions.numel(), device=key.device)
        future = order > positions[rank].unsqueeze(1)
        hidden = future if attention_mask is None else attention_mask | future
        return super().forward(query, key, value, hidden, *args, **kwargs)


def install() -> None:
    """``DotProductAttention(config, ...)`` is the class above under context parallelism."""

    def new(cls: type, config: Config = None, *args: Any, **kwargs: Any) -> Any:
        several = config is not None and config.context_parallel_size > 1
        if cls is DotProductAttention and several:
            return object.__new__(ContextParallelAttention)
        return object.__new__(cls)

    DotProductAttention.__new__ = new
