"""Steering: domain tokens to the experts that learn from them, general tokens as before.

``losses`` is the maths on explicit tensors, ``steering`` attaches it to Megatron's routers,
``balance`` keeps the stock balance losses to general tokens, ``setup`` puts it together.
"""

from typing import Any

__all__ = ["steering_loss"]


def __getattr__(name: str) -> Any:
    """``steering_loss`` needs torch, which what only reads files does without."""
    if name == "steering_loss":
        from megatron_moe_inject.routing.losses import steering_loss

        return steering_loss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
