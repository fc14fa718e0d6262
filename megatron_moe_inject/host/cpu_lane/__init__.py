"""Real Megatron training on gloo processes of a machine without a GPU.

Megatron assumes a CUDA device in a few hundred places. ``enable()`` answers those places with
the CPU instead of changing them: a device-less ``torch.cuda`` (``torch_device``), the few
Megatron parts without a CPU path (``megatron_parts``, ``context_parallel``, ``packed``,
``latent_attention``, ``mamba``) and the flags that follow from it (``flags``). Maths, schedules,
process groups, optimizers, data order and checkpoints stay Megatron's own, so that parallel logic
can be developed and tested anywhere. Speed, memory figures, kernels, FP8 and Transformer Engine are
not what this lane shows.
"""

import os
import sys

import torch

from megatron_moe_inject.host import compat
from megatron_moe_inject.host.cpu_lane import flags, megatron_parts, torch_device

_MARK = "_moe_inject_cpu_lane"
_FOR_GPUS = ("transformer_engine", "apex", "mamba_ssm", "causal_conv1d", "fla")
"""Packages that Megatron uses wherever they can be imported; they run on a GPU only."""


class GpuPresentError(RuntimeError):
    """The lane was asked for on a machine that has a usable GPU."""


def is_enabled() -> bool:
    """Whether ``enable()`` has run in this process."""
    return hasattr(torch.cuda, _MARK)


def enable(force: bool = False) -> None:
    """Put every stand-in in place for the rest of this process; a second call changes nothing.

    Call it before the training script is imported. ``force`` runs on the CPU although a GPU is
    there. Rank 0 prints one line that says so. No collective runs.

    Raises:
        GpuPresentError: ``torch.cuda`` works here and ``force`` is not set.
    """
    if is_enabled():
        return
    if torch.cuda.is_available() and not force:
        raise GpuPresentError(
            f"the CPU lane is for machines without a GPU, and this one has "
            f"{torch.cuda.device_count()}: run without --cpu to train on it, or add --cpu-force "
            "to train on the CPU all the same"
        )
    # Megatron compiles small fusions at import; on a CPU that costs minutes and a C++ compiler.
    if "TORCHDYNAMO_DISABLE" not in os.environ:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        if "torch._dynamo" in sys.modules:  # it has read that already
            torch._dynamo.config.disable = True
    # Megatron asserts this setting under tensor parallelism; it orders CUDA queues only.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    for name in _FOR_GPUS:
        # As if it were not installed.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # typeshed knows no None here
    torch_device.install()
    setattr(torch.cuda, _MARK, True)
    compat.use_prebuilt_dataset_helpers()
    megatron_parts.install()
    from megatron_moe_inject.host.cpu_lane import (
        context_parallel,
        hybrid,
        latent_attention,
        mamba,
        optimizer,
        packed,
    )

    optimizer.load_distributed_optimizer_without_te()
    context_parallel.install()
    packed.install()
    latent_attention.install()
    mamba.install()
    hybrid.install()
    flags.install()
    if os.environ.get("RANK", "0") == "0":
        print(
            "moe-inject: CPU development lane: real Megatron on gloo, no GPU; not for production",
            flush=True,
        )


__all__ = ["GpuPresentError", "enable", "is_enabled"]
