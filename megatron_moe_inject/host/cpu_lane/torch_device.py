"""A ``torch.cuda`` that answers for the CPU: one device per local process, no driver.

Each stand-in says which Megatron code needs it. Work on a CPU is synchronous, so streams and
events have nothing to order. Random numbers of "the GPU" come from the CPU generator, through
torch's own code: saving, forking and restoring states works as on a device.
"""

import collections
import contextlib
import functools
import logging
import os
import resource
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_torch: Any = torch
"""What the stand-ins are put into: other functions and types than the stubs know there."""
MAKERS = (
    (
        _torch,
        "arange as_tensor asarray bartlett_window blackman_window empty empty_like empty_permuted "
        "empty_quantized empty_strided eye full full_like hamming_window hann_window kaiser_window "
        "linspace logspace normal ones ones_like rand rand_like randint randint_like randn "
        "randn_like randperm range scalar_tensor sparse_bsc_tensor sparse_bsr_tensor "
        "sparse_compressed_tensor sparse_coo_tensor sparse_csc_tensor sparse_csr_tensor tensor "
        "tril_indices triu_indices zeros zeros_like",
    ),
    (_torch.fft, "fftfreq rfftfreq"),
    (_torch.nested, "as_nested_tensor nested_tensor"),
    (
        _torch.Tensor,
        "new_empty new_empty_strided new_full new_ones new_tensor new_zeros",
    ),
)
"""Functions that make a tensor where ``device=`` says, by where they stand."""


class Stream:
    """Side streams of DDP, the MoE dispatcher and the optimizer: every stream is the CPU's."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return hash(Stream)

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        pass


class Event:
    """Timers of the straggler detector and stream ordering: wall clock, always complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._recorded_at = 0.0

    def record(self, stream: Any = None) -> None:
        self._recorded_at = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds from this event to ``end``."""
        return 1e3 * (end._recorded_at - self._recorded_at)


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Inside, what names a CUDA device gets tensors without storage (``planning`` builds so)."""
    global _CPU
    before, _CPU = _CPU, torch.device("meta")
    try:
        yield
    finally:
        _CPU = before


def _cpu_for(device: Any) -> Any:
    """The CPU where ``device`` names a CUDA device; anything else unchanged."""
    if isinstance(device, int) and not isinstance(device, bool):
        return _CPU
    if isinstance(device, str | torch.device) and str(device).startswith("cuda"):
        return _CPU
    return device


def device_count() -> int:
    """Ranks check their local rank against it: one device per process of this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def current_device() -> int:
    """Used as ``device=`` and in messages: the local rank, as after ``set_device``."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def device_properties(device: Any = None) -> types.SimpleNamespace:
    """Read for architecture checks: an Ampere-class device with this machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return types.SimpleNamespace(
        name="cpu", major=8, minor=0, total_memory=memory, multi_processor_count=1, uuid="cpu"
    )


def resident_bytes() -> int:
    """Logged as allocated memory: what the process holds now."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Logged as peak memory: the most the process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_stats(device: Any = None) -> dict[str, int]:
    """Written to TensorBoard by ``--log-memory-to-tensorboard``: resident size, no breakdown."""
    now, peak = resident_bytes(), peak_resident_bytes()
    stats: dict[str, int] = collections.defaultdict(int)
    for kind in ("allocated_bytes", "reserved_bytes", "active_bytes"):
        stats[f"{kind}.all.current"] = now
        stats[f"{kind}.all.peak"] = peak
    return stats


def _no_op() -> Callable[..., None]:
    """For calls that only order, free or mark device work.

    A fresh function each time: dynamo keys its tables of torch functions by object.
    """
    return lambda *args, **kwargs: None


def _no_driver_calls() -> None:
    """``torch.cuda`` functions that would ask the driver."""
    replacements = {
        "is_available": lambda: True,
        "device_count": device_count,
        "current_device": current_device,
        "set_device": _no_op(),
        "get_device_properties": device_properties,
        "get_device_capability": lambda device=None: (8, 0),
        "get_device_name": lambda device=None: "cpu",
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "synchronize": _no_op(),
        "empty_cache": _no_op(),
        "Stream": Stream,
        "Event": Event,
        "stream": lambda stream: contextlib.nullcontext(stream),
        "set_stream": _no_op(),
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "memory_allocated": lambda device=None: resident_bytes(),
        "memory_reserved": lambda device=None: resident_bytes(),
        "max_memory_allocated": lambda device=None: peak_resident_bytes(),
        "max_memory_reserved": lambda device=None: peak_resident_bytes(),
        "device_memory_used": lambda device=None: resident_bytes(),
        "memory_stats": memory_stats,
        "reset_peak_memory_stats": _no_op(),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _no_op())


def _device_generator_is_cpu_generator() -> None:
    """Megatron's RNG tracker, recompute and checkpoints: torch's code over the CPU generator."""
    _torch.cuda._initialized = True
    _torch.cuda._is_in_bad_fork = lambda: False  # no driver state that a fork could spoil
    _torch.cuda.default_generators = (torch.default_generator,) * device_count()
    _torch.cuda.random.current_device = current_device
    _torch.cuda.random.device_count = device_count

    def both_generators_moved(record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()

    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(both_generators_moved)


def _tensors_stay() -> None:
    """``.cuda()`` in the batch and model code, pinning and stream marks: the tensor itself."""
    _torch.Tensor.cuda = lambda self, *args, **kwargs: self
    _torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    _torch.Tensor.record_stream = _no_op()


def _type_names_are_cuda() -> None:
    """Optimizers and grad clipping sort parameters by ``tensor.type()`` names of CUDA types."""
    original = torch.Tensor.type

    @functools.wraps(original)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if isinstance(result, str) and not result.startswith("torch.cuda."):
            return result.replace("torch.meta.", "torch.").replace("torch.", "torch.cuda.", 1)
        return result

    _torch.Tensor.type = type_


def _made_on_cpu(owner: Any, name: str) -> None:
    """That function of ``owner``: a CUDA device that it is told to make a tensor on is the CPU,
    and no memory is pinned."""
    stock = getattr(owner, name)

    @functools.wraps(stock)
    def made(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _cpu_for(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return stock(*args, **kwargs)

    setattr(owner, name, made)


def _tensors_are_made_on_cpu() -> None:
    """Factories and ``Tensor.to`` that name a CUDA device (``device="cuda"``, an index).

    Each is replaced. A ``TorchFunctionMode`` would be shorter, but has every operation and every
    look at a tensor's shape call Python.
    """
    # torch's own list of functions for ``with torch.device(...)``: made now, of what is called
    # below the replacements.
    _device_constructors()
    for owner, names in MAKERS:
        for name in names.split():
            _made_on_cpu(owner, name)
    stock = torch.Tensor.to

    @functools.wraps(stock)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            args = (_cpu_for(args[0]), *args[1:])
        if kwargs.get("device") is not None:
            kwargs["device"] = _cpu_for(kwargs["device"])
        return stock(self, *args, **kwargs)

    _torch.Tensor.to = to


def _torch_sees_no_accelerator() -> None:
    """``torch`` itself (data loader pinning, checkpoint planners) must not look for a device."""
    _torch.accelerator.is_available = lambda: False


def install() -> None:
    """Put all of the above in place."""
    _no_driver_calls()
    _device_generator_is_cpu_generator()
    _tensors_stay()
    _type_names_are_cuda()
    _torch_sees_no_accelerator()
    _tensors_are_made_on_cpu()
