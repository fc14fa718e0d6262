"""Megatron-Bridge trains with loops of its own, which are refused where the plugin is installed

``megatron.bridge`` 0.6 calls none of the functions of ``megatron.training`` that the plugin wraps:
its ``pretrain``, ``setup``, ``train`` and checkpoints are its own, and there is no
``get_args()``. A recipe would be ignored without a word. So the first function that each of its
loops calls ends the job in one line instead. What only converts models is left alone.

Bridge may be imported before the plugin is installed or after it, and scripts keep what they
imported; so what is wrapped is what its modules look up when they are called, once they exist.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from argparse import Namespace
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from megatron_moe_inject.host import failure
from megatron_moe_inject.host.contract import Wrapped
from megatron_moe_inject.host.meeting import Meeting
from megatron_moe_inject.host.wrap import Call, wrap_method

_TRAINING = "megatron.bridge.training"
DOORS = {
    f"{_TRAINING}.pretrain": "runtime_config_update",
    f"{_TRAINING}.pretrain_megatron_mimo": "megatron_mimo_runtime_config_update",
    f"{_TRAINING}.setup": "initialize_megatron",
}
"""By module of Bridge: what its loop calls before it builds anything. ``finetune`` and ``distill``
call ``pretrain``; a script with a loop of its own calls ``setup``."""
MESSAGE = (
    "megatron.bridge trains with a loop of its own, in which the plugin has no part: a recipe "
    "would be ignored. Train with `python -m megatron_moe_inject.pretrain` or one of Megatron-LM's "
    "scripts, from a checkpoint that `moe-inject import-hf` makes of the model's folder; to train "
    "with Bridge and without a recipe, leave out the launcher and install(). "
    "See the page megatron_moe_inject/host/README.md, Megatron-Bridge"
)
_MINUTES = 10
"""For ranks to meet, which come here when their imports are done."""


def refuse_training() -> None:
    """Let Bridge's training loops end in ``MESSAGE``, whether Bridge is imported yet or later.

    A second call changes nothing. No collective.
    """
    for name in DOORS:
        if name in sys.modules:
            _close(sys.modules[name])
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(importlib.abc.MetaPathFinder):
    """Leaves finding and loading to others, and closes Bridge's doors when they are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in DOORS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            @functools.wraps(load)
            def exec_module(module: ModuleType) -> None:
                load(module)
                _close(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _close(module: ModuleType) -> None:
    """Wrap what the loop calls first.

    Raises:
        ImportError: this Bridge calls something else, so that training could not be refused.
    """
    name = DOORS[module.__name__]
    if not hasattr(module, name):
        raise ImportError(
            f"{module.__name__} has no {name}: a Megatron-Bridge that the plugin does not know. "
            f"{MESSAGE}"
        )
    wrap_method(module, Wrapped(f"{module.__name__}.{name}", does="refuses to train"), _refuse)


def _refuse(call: Call) -> NoReturn:
    """Every rank comes here; one line for each node, and no process group is made."""
    failure.end(MESSAGE, Meeting.of_job(Namespace(distributed_timeout_minutes=_MINUTES)))
