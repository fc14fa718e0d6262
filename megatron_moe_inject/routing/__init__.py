"""Steering: domain tokens to the experts that learn from them, general tokens as before.

``losses`` is the maths on explicit tensors, ``steering`` attaches it to Megatron's routers,
``balance`` keeps the stock balance losses to general tokens, ``setup`` puts it together.
"""

from typing import TYPE_CHECKING

from megatron_moe_inject.host.lazy_names import lazy_names

if TYPE_CHECKING:
    from megatron_moe_inject.routing.losses import steering_loss
else:
    __getattr__ = lazy_names(__name__, {"losses": ("steering_loss",)})

__all__ = ["steering_loss"]
