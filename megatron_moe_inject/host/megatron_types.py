"""Megatron's objects, which the contract (host/contract.py) looks at instead of types."""

from typing import Any

Chunk = Any
"""A bare model chunk, such as GPTModel."""
MegatronModule = Any
"""A layer, router or group of experts."""
Config = Any
"""Its TransformerConfig."""
Groups = Any
"""A ProcessGroupCollection."""
Optimizer = Any
"""Megatron's optimizer of the trained parameters."""
