"""The only place that knows Megatron versions.

Everything else asks this module for symbols whose place or signature changed between
Megatron-Core 0.18, 0.19 and the development branch.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

SUPPORTED = ("0.18.2", "0.19", "0.20 (development)")

REQUIRED_SYMBOLS = {
    "megatron.training.arguments": ("add_megatron_arguments", "parse_and_validate_args"),
    "megatron.training.training": (
        "pretrain",
        "setup_model_and_optimizer",
        "build_train_valid_test_data_iterators",
        "get_forward_backward_func",
        "train",
        "evaluate",
    ),
    "megatron.training": ("pretrain", "get_args", "print_rank_0"),
    "megatron.core.models.gpt.gpt_model": ("GPTModel",),
    "megatron.core.optimizer.optimizer": ("ChainedOptimizer",),
    "megatron.core.tensor_parallel": ("gather_from_sequence_parallel_region",),
    "megatron.core.utils": ("get_attr_wrapped_model", "unwrap_model"),
}
"""Megatron symbols that the wiring uses, by module."""

REQUIRED_PARAMETERS = {
    ("megatron.core.models.gpt.gpt_model", "GPTModel.forward"): ("output_processor", "loss_mask"),
    ("megatron.training.training", "setup_model_and_optimizer"): ("model_provider_func",),
    ("megatron.core.tensor_parallel", "gather_from_sequence_parallel_region"): (
        "tensor_parallel_output_grad",
        "group",
    ),
}
"""Parameters that those symbols must have."""


def megatron_version() -> str:
    """Version of the Megatron-Core that is imported."""
    from megatron.core import package_info

    return package_info.__version__


def _resolve(module: str, qualified_name: str) -> Any:
    value: Any = importlib.import_module(module)
    for part in qualified_name.split("."):
        value = getattr(value, part)
    return value


def missing_symbols() -> list[str]:
    """Full names of required Megatron symbols, or ``symbol(parameter)``, that are not there."""
    missing = []
    for module, names in REQUIRED_SYMBOLS.items():
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            missing.append(f"{module} ({error})")
            continue
        missing += [f"{module}.{name}" for name in names if not hasattr(found, name)]
    for (module, name), parameters in REQUIRED_PARAMETERS.items():
        try:
            present = inspect.signature(_resolve(module, name)).parameters
        except (ImportError, AttributeError):
            missing.append(f"{module}.{name}")
            continue
        missing += [f"{module}.{name}({p})" for p in parameters if p not in present]
    return sorted(set(missing))


def require_symbols() -> None:
    """Check once, at install, that this Megatron offers what the plugin uses.

    Raises:
        ImportError: naming every missing symbol, the version found and those supported.
    """
    missing = missing_symbols()
    if missing:
        raise ImportError(
            f"megatron_moe_inject needs {', '.join(missing)}, which Megatron-Core "
            f"{megatron_version()} does not have; supported: {', '.join(SUPPORTED)}"
        )


def call_with_pre_wrap_hook(
    setup_model_and_optimizer: Callable,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    hook: Callable[[list[torch.nn.Module]], list[torch.nn.Module]],
) -> Any:
    """Call ``setup_model_and_optimizer`` so that ``hook`` sees the bare chunks before DDP does.

    0.19 scripts hand over a model config with ``pre_wrap_hooks``; otherwise (0.18, or a script
    that passes ``model_provider``) the provider is wrapped, and the hook then gets each virtual
    pipeline chunk on its own.
    """
    bound = inspect.signature(setup_model_and_optimizer).bind(*args, **kwargs)
    container = bound.arguments.get("cfg_container")
    model_config = getattr(container, "model", None)
    if model_config is not None:
        model_config.pre_wrap_hooks.append(hook)
        try:
            return setup_model_and_optimizer(*bound.args, **bound.kwargs)
        finally:
            model_config.pre_wrap_hooks.remove(hook)
    provider = bound.arguments["model_provider_func"]

    def hooked_provider(*provider_args, **provider_kwargs):
        return hook([provider(*provider_args, **provider_kwargs)])[0]

    bound.arguments["model_provider_func"] = hooked_provider
    return setup_model_and_optimizer(*bound.args, **bound.kwargs)


def bare_chunks(model: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """Model chunks without DDP and Float16 wrappers."""
    from megatron.core.utils import unwrap_model

    return list(unwrap_model(list(model)))


def tokenizer_vocab_size() -> int:
    """Ids of the tokenizer that Megatron built from its flags, without padding."""
    from megatron.training.global_vars import get_tokenizer

    return int(get_tokenizer().vocab_size)


def process_groups(chunk: torch.nn.Module) -> Any:
    """The ``ProcessGroupCollection`` that a bare model chunk was built with."""
    groups = getattr(chunk, "pg_collection", None)
    if groups is not None and all(hasattr(groups, g) for g in ("tp", "pp", "cp", "mp", "tp_cp")):
        return groups
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection.use_mpu_process_groups()


def save_with_stub_optimizers() -> None:
    """Let ``torch_dist`` checkpoints be saved when only expert parameters train.

    Megatron then keeps a stub, without an inner optimizer, for the dense parameters, and
    ``ChainedOptimizer._synchronize_steps`` (0.18.2 to 0.19.2) reads the stub's
    ``optimizer.param_groups``. The wrapper hides stubs from that one method. Idempotent.
    """
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    stock = ChainedOptimizer._synchronize_steps
    if hasattr(stock, "__wrapped__"):
        return

    def _synchronize_steps(self):
        everything = self.chained_optimizers
        self.chained_optimizers = [o for o in everything if o.optimizer is not None]
        try:
            return stock(self)
        finally:
            self.chained_optimizers = everything

    _synchronize_steps.__wrapped__ = stock
    ChainedOptimizer._synchronize_steps = _synchronize_steps
