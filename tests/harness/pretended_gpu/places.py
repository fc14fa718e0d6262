"""Where tensors lie, and who made the host wait."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_moe_inject.host.cpu_lane import torch_device

PREFIX = "pretended gpu: "
CPU, GPU, EITHER = "cpu", "gpu", "either"
"""Places. ``EITHER`` has what torch's own C++ code made of a tensor's options, of which the place
is not known: the first operation with another tensor decides."""

_STAND_INS = "megatron_moe_inject/host/cpu_lane/"
without_function_modes = torch._C.DisableTorchFunction
_HERE = (os.path.dirname(torch.__file__), os.path.dirname(__file__), torch_device.__file__)
_ROOT = str(Path(__file__).resolve().parents[3])
STOCK: dict[str, Any] = {
    name: getattr(torch.Tensor, name)
    for name in (
        *("device", "is_cuda", "is_cpu", "to", "numpy", "tolist", "type", "__array__"),
        *("pin_memory", "is_pinned", "get_device", "new_tensor"),
    )
}
"""torch's own of what is replaced."""


class State:
    """What is going on in this process.

    Attributes:
        waits: how often each line made the host wait, and why.
        flights: of the calls into torch that are under way, what they say of new tensors' place.
        moving: the place that a copy goes to.
        landed: counts the host's waits: what was copied before the last one has arrived.
        on_host: names of groups of the host.
    """

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.flights: list[str] = []
        self.moving: str | None = None
        self.landed = 0
        self.on_host: set[str] = set()


state = State()


def place(tensor: torch.Tensor) -> str:
    """Where a tensor lies; a quantised one of Transformer Engine's kind, where its codes do."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        tensor = tensor.__dict__.get("_rowwise_data", tensor)
    return getattr(storage_of(tensor), "place", CPU)


def storage_of(tensor: torch.Tensor) -> Any:
    with without_function_modes():
        return torch._C.TensorBase.untyped_storage(tensor)


def put(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """Say where a new tensor lies."""
    storage_of(tensor).place = where
    return tensor


def is_gpu(device: Any) -> bool:
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def place_of(device: Any) -> str:
    return GPU if is_gpu(device) else CPU


def device_of(tensor: torch.Tensor) -> torch.device:
    if place(tensor) == GPU:
        return torch.device("cuda", torch.cuda.current_device())
    with without_function_modes():
        return STOCK["device"].__get__(tensor)


# What the host waits for, and who asked


def asking_line() -> str:
    """The line of the innermost frame that is neither torch's nor of this harness."""
    frame: Any = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    name = frame.f_code.co_filename
    packages = os.path.dirname(os.path.dirname(torch.__file__))  # may lie below the root
    for root in (packages, _ROOT):
        name = name.removeprefix(root + os.sep)
    return f"{name}:{frame.f_lineno} {frame.f_code.co_qualname}"


def waits(why: str) -> None:
    """The host waits for the device."""
    line = asking_line()
    if not line.startswith(_STAND_INS):
        state.waits[f"{line} ({why})"] += 1
    state.landed += 1


def fault(message: str) -> None:
    """What a GPU would not do. ``TESTS_PRETENDED_GPU=record`` goes on, and says all of them."""
    if os.environ.get("TESTS_PRETENDED_GPU") != "record":
        raise RuntimeError(f"{message} [{asking_line()}]")
    print(f"{PREFIX}fault: {message} [{asking_line()}]", flush=True)


def host_reads(tensor: torch.Tensor, what: str) -> None:
    """The host reads the values of a CPU tensor."""
    if getattr(storage_of(tensor), "lands", -1) == state.landed:
        fault(f"{what} reads a CPU tensor that an asynchronous copy may not have reached yet")


def tensors_in(values: Iterable[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif type(value) in (list, tuple) or isinstance(value, list | tuple):
            found += tensors_in(value)
        elif isinstance(value, dict) and value:
            found += tensors_in(value.values())
    return found
