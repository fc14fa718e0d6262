"""The two names under which Megatron's checkpoints hold a layer's norm.

Transformer Engine keeps a norm in the linear layer behind it. Megatron's local layers store theirs
as if they did, in front of experts too, where Transformer Engine has no such linear layer and
stores the norm under its own name. So either kind of layers can meet a checkpoint of the other.
"""

from __future__ import annotations

from collections.abc import Container

_NORMS = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_"),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_"),
)
"""Parts of both names."""


def stored_name(name: str, stored: Container[str]) -> str:
    """The name under which a checkpoint with the names ``stored`` has a tensor: the same one, or
    the other name of a norm. The same where it has neither."""
    if name in stored:
        return name
    for pair in _NORMS:
        for part, other in (pair, pair[::-1]):
            if part in name and (renamed := name.replace(part, other)) in stored:
                return renamed
    return name


def other_name(name: str) -> str | None:
    """The other name of a norm's tensor, ``None`` for what has one name."""
    for pair in _NORMS:
        for part, other in (pair, pair[::-1]):
            if part in name:
                return name.replace(part, other)
    return None
