"""The CPU lane with Transformer Engine visible, for what can be seen without running its kernels.

Its modules are built on the CPU once ``torch.cuda`` answers; their forward passes need a GPU. So a
run ends where training would begin, and saves its checkpoint if it was asked to.
"""

from __future__ import annotations

import functools

import torch

_RUNS_ON_A_GPU = ("transformer_impl", "moe_grouped_gemm", "fp8", "hybrid_layer_pattern")


def allow() -> None:
    """Before the lane is enabled: TE can be imported, its flags pass, the device is a Hopper."""
    from megatron_moe_inject.host import cpu_lane
    from megatron_moe_inject.host.cpu_lane import flags, hybrid, latent_attention, torch_device

    cpu_lane._FOR_GPUS = ()
    for part in (hybrid, latent_attention):  # the stack and the projections are Megatron's own
        part.install = lambda: None
    for name in _RUNS_ON_A_GPU:
        del flags._REFUSED[name]
    ampere = torch_device.device_properties

    def hopper(device=None):
        properties = ampere(device)
        properties.major = 9
        return properties

    torch_device.device_properties = hopper


def stop_before_training(training) -> None:
    """``train()`` answers that one iteration is done; ``pretrain()`` then saves, evaluates not."""
    torch.cuda.get_device_capability = lambda device=None: (9, 0)

    @functools.wraps(training.train)
    def train(*args, **kwargs):
        return 1, 0.0

    training.train = train
    training.evaluate_and_print_results = lambda *args, **kwargs: None
