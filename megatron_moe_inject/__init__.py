"""Distil dense teachers into chosen experts of a Megatron-Core MoE model while it trains.

Start with ``install.py``: it is the only wiring between this package and Megatron.
"""

__version__ = "0.1.0"


def install() -> None:
    """Put the plugin's flags and hooks into ``megatron.training``; a second call changes nothing.

    Must run before the training script imports names from ``megatron.training``, because
    scripts bind ``pretrain`` and ``parse_and_validate_args`` by value. Without an ``--inject-*``
    flag on the command line the installed hooks stand aside and training is bitwise stock.
    """
    from megatron_moe_inject.install import install as _install

    _install()


__all__ = ["__version__", "install"]
