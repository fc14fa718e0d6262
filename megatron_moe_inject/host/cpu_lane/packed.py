"""Local attention over packed documents (``--dataloader-inter-document-masking``, Megatron 0.19).

Stock local attention refuses packed batches, which Transformer Engine runs without padding or
masked work. Here the pack is one long sequence whose mask hides other documents: the same
result for full-length score rows in memory.

Shapes: t tokens of the pack, n heads and g key groups of this tensor rank, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_moe_inject.host.lane_uses import LANE_ATTENTION
from megatron_moe_inject.host.wrap import Call, wrap_function


def hidden_pairs(boundaries: torch.Tensor, tokens: int) -> torch.Tensor:
    """``[t, t]`` bool, true where a query may not see a key: later, or of another document.

    ``boundaries`` holds the start of each document and the end of the last, as ``cu_seqlens``.
    """
    position = torch.arange(tokens, device=boundaries.device)
    document = torch.searchsorted(boundaries.long(), position, right=True)
    other = document.unsqueeze(1) != document
    return other | (position > position.unsqueeze(1))


def install() -> None:
    """Give ``DotProductAttention.forward`` a path for packed batches; others take the stock one."""
    wrap_function(LANE_ATTENTION, _forward)


def _forward(call: Call) -> torch.Tensor:
    """Packed: ``[t, n, d]`` queries, ``[t, g, d]`` keys and values -> ``[t, 1, n*d]``.

    Multi-latent attention pads its values to the width of its keys, and takes ``[t, n*d]``.
    """
    packed = call["packed_seq_params"]
    if packed is None:
        return call()
    query, key, value = (call[name].unsqueeze(1) for name in ("query", "key", "value"))
    hidden = hidden_pairs(packed.cu_seqlens_q, len(query))
    own = call["self"].hidden_size_per_partition // query.size(2)
    padding = value.size(3) - own
    plain = {"attention_mask": hidden, "packed_seq_params": None}
    out = call(query=query, key=key, value=value[..., :own], **plain)
    return out if not padding else F.pad(out.unflatten(2, (-1, own)), (0, padding)).flatten(1)
