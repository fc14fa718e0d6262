"""Local attention over packed documents (``--dataloader-inter-document-masking``, Megatron 0.19).

Stock local attention refuses packed batches, which Transformer Engine runs without padding or
masked work. Here the pack is one long sequence whose mask hides other documents: the same
result for full-length score rows in memory.

Shapes: t tokens of the pack, n heads and g key groups of this tensor rank, d head size.
"""

from __future__ import annotations

import functools

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention


def hidden_pairs(boundaries: torch.Tensor, tokens: int) -> torch.Tensor:
    """``[t, t]`` bool, true where a query may not see a key: later, or of another document.

    ``boundaries`` holds the start of each document and the end of the last, as ``cu_seqlens``.
    """
    position = torch.arange(tokens)
    document = torch.searchsorted(boundaries.long(), position, right=True)
    other = document.unsqueeze(1) != document
    return other | (position > position.unsqueeze(1))


def install() -> None:
    """Give ``DotProductAttention.forward`` a path for packed batches; others take the stock one."""
    stock = DotProductAttention.forward

    @functools.wraps(stock)
    def forward(self, query, key, value, attention_mask, *args, packed_seq_params=None, **kwargs):
        """Packed: ``[t, n, d]`` queries, ``[t, g, d]`` keys and values -> ``[t, 1, n*d]``."""
        if packed_seq_params is None:
            return stock(self, query, key, value, attention_mask, *args, **kwargs)
        hidden = hidden_pairs(packed_seq_params.cu_seqlens_q, query.size(0))
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        return stock(self, query, key, value, hidden, *args, **kwargs)

    DotProductAttention.forward = forward
