"""Random number generators that what is built or runs beside training must leave as they are.

Building a module draws initial weights, Megatron's attention enters its RNG tracker, and fused
attention kernels advance the CUDA generator's offset even without dropout. Routers draw in eval
mode, too, with ``--moe-input-jitter-eps`` and where balance is forced. The student's dropout masks
and noise would then depend on what stands beside it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

_TRACKER_MODULE = "megatron.core.tensor_parallel.random"
_ROUTER_MODULE = "megatron.core.transformer.moe.moe_utils"


def _tracker() -> Any:
    """Megatron's RNG tracker where a run has seeded one; asking for it would create it."""
    module = sys.modules.get(_TRACKER_MODULE)
    if module is None or not module._CUDA_RNG_STATE_TRACKER_INITIALIZED:
        return None
    return module.get_cuda_rng_tracker()


def _biases() -> dict:
    """Each layer's random bias that ``--moe-router-force-biased`` with a negative value draws once;
    drawn anew, it moves Megatron's tracker."""
    shared = getattr(sys.modules.get(_ROUTER_MODULE), "RandomSTEShared", None)
    return {} if shared is None else shared._cache


@contextlib.contextmanager
def untouched_rng(device: torch.device) -> Iterator[None]:
    """Put torch's CPU generator, that of ``device`` and Megatron's tracker back at the end.

    Graph-safe trackers hold generators instead of states; these are set back in place, because
    captured CUDA graphs refer to the objects. States lie on the host: no device is waited for, and
    there is no collective.
    """
    biases = _biases()
    known = dict(biases)
    cpu_state = torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    tracker = _tracker()
    states = {} if tracker is None else tracker.get_states()
    inner = {
        name: state.get_state() if isinstance(state, torch.Generator) else state
        for name, state in states.items()
    }
    try:
        yield
    finally:
        biases.clear()
        biases.update(known)
        for name, state in inner.items():
            if isinstance(states[name], torch.Generator):
                states[name].set_state(state)
        if states:
            tracker.set_states(states)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, device)
        torch.set_rng_state(cpu_state)
