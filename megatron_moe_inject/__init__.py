"""Distil dense teachers into chosen experts of a Megatron-Core MoE model while it trains.

Start with ``install.py``: it is the only wiring between this package and Megatron.
"""

# Bound at import: the submodule of this name would otherwise replace the function later.
from megatron_moe_inject.host.version import VERSION
from megatron_moe_inject.install import install

__version__ = VERSION

__all__ = ["__version__", "install"]
