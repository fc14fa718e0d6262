"""One rank of one arm of ``freeze_bench.py``: real training that takes its steps in turns.

Before every step it waits for the word of the benchmark, so that the arms alternate and the noise
of the machine hits all alike; after every step it answers with what the step took.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

SPECIFICATION = "FREEZE_BENCH_WORKER"
"""Environment variable with what to run, see ``freeze_bench.start``."""


GRAD_NORM = 5
"""Its place in what Megatron's ``train_step`` returns."""


class Turns:
    """The benchmark's end of the line: one JSON object a line, answered by an empty line."""

    def __init__(self, port: int, name: dict[str, Any]) -> None:
        self._line = socket.create_connection(("127.0.0.1", port)).makefile("rw")
        self.tell(name)

    def tell(self, what: dict[str, Any]) -> None:
        self._line.write(json.dumps(what) + "\n")
        self._line.flush()

    def wait(self) -> None:
        """Until it is this arm's turn; ends the process where the benchmark is gone."""
        if not self._line.readline():
            os._exit(0)


class Memory:
    """Peak memory beyond what was held when ``begin`` was called.

    On a GPU what torch allocated; on a CPU the resident set, which Linux counts in whole pages
    and which also holds what the allocator has not given back.

    Attributes:
        built: what was held then, in bytes.
    """

    def __init__(self, cpu: bool) -> None:
        self._cpu = cpu
        self.built = 0

    def begin(self) -> None:
        self.built = self._status("VmRSS") if self._cpu else _cuda().memory_allocated()

    def reset(self) -> None:
        """Forget the peak so far."""
        if self._cpu:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        else:
            _cuda().reset_peak_memory_stats()

    def peak(self) -> int:
        """Bytes, since ``reset``."""
        now = self._status("VmHWM") if self._cpu else _cuda().max_memory_allocated()
        return now - self.built

    @staticmethod
    def _status(field: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024


def _cuda() -> Any:
    import torch

    return torch.cuda


def traced(step: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """A step under torch's profiler: what it returns, and what the GPU did in it.

    Returns:
        ``device_seconds``, in which any kernel or copy ran; ``launches``, how many; ``kernels``, a
        list of [name, milliseconds, count], the longest first.
    """
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        result = step()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if not event.is_user_annotation]
    device = [event for event in events if event.device_type == DeviceType.CUDA]
    busy = end = 0.0
    for event in sorted(device, key=lambda event: event.time_range.start):
        busy += max(0.0, event.time_range.end - max(end, event.time_range.start))
        end = max(end, event.time_range.end)
    return result, {
        "device_seconds": busy / 1e6,
        "launches": len(device),
        "kernels": longest((e.name, e.time_range.elapsed_us()) for e in device),
    }


def longest(times: Iterable[tuple[str, float]], most: int = 40) -> list[list[Any]]:
    """[name, milliseconds, count] of (name, microseconds), the longest sums first."""
    sums: dict[str, list[float]] = {}
    for name, microseconds in times:
        found = sums.setdefault(name[:120], [0.0, 0])
        found[0] += microseconds / 1e3
        found[1] += 1
    rows = [[name, round(ms, 3), count] for name, (ms, count) in sums.items()]
    return sorted(rows, key=lambda row: -row[1])[:most]


def held(chunks: list[Any], optimizer: Any) -> dict[str, int]:
    """What training holds on this rank, counted from the objects.

    Returns:
        ``trained`` parameters, ``gradient_bytes`` of DDP's buffers, and ``optimizer_bytes``:
        states and the main copies of parameters that are not the model's own.
    """
    import torch

    own = {id(p) for chunk in chunks for p in chunk.parameters()}
    buffers = [b for c in chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
    state = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if inner is None:
            continue
        tensors = [t for values in inner.state.values() for t in values.values()]
        mains = [p for group in inner.param_groups for p in group["params"] if id(p) not in own]
        state += sum(t.nbytes for t in [*tensors, *mains] if torch.is_tensor(t))
    return {
        "trained": sum(p.numel() for c in chunks for p in c.parameters() if p.requires_grad),
        "gradient_bytes": sum(b.grad_data.nbytes for b in buffers),
        "optimizer_bytes": state,
    }


def set_flags(chunks: list[Any], chosen: dict[str, list[int]]) -> list[Any]:
    """``requires_grad`` of the chosen experts alone, as a training script without plugin can."""
    from megatron_moe_inject.host.model_parts import (
        places,
    )

    for chunk in chunks:
        for place, parameter in places(chunk):
            ids = chosen.get(str(place.layer), [])
            parameter.requires_grad_(place.component == "experts" and place.expert in ids)
    return chunks


def main() -> None:
    """Train as the environment says."""
    spec = json.loads(os.environ[SPECIFICATION])
    turns = Turns(spec["port"], {"arm": spec["arm"], "rank": int(os.environ["RANK"])})
    from megatron_moe_inject import launch
    from megatron_moe_inject.host import compat, cpu_lane

    if spec["plugin"]:
        launch.prepare()
    else:
        if spec["cpu"]:
            cpu_lane.enable()
        compat.use_prebuilt_dataset_helpers()
    import torch
    from megatron.training import training

    memory = Memory(spec["cpu"])
    build, train_step = training.setup_model_and_optimizer, training.train_step
    steps = 0

    def bare(chunks):
        memory.begin()
        return chunks if spec["flags"] is None else set_flags(chunks, spec["flags"])

    def timed_step(*args, **kwargs):
        nonlocal steps
        untimed = spec["warm_up"] if spec.get("warm_up_at_once") else 0
        if steps == untimed:
            turns.tell({"ready": True})
        if steps >= untimed:
            turns.wait()
        if steps == spec["warm_up"]:
            memory.reset()
        torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        step = functools.partial(train_step, *args, **kwargs)
        # The first step under the profiler sets it up, while nobody waits for this arm.
        if spec.get("traced") and (steps == 0 or steps >= spec["steps"] - spec["traced"]):
            result, answer = traced(step)
        else:
            result, answer = step(), {}
        torch.cuda.synchronize()
        answer |= {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        answer["grad_norm"] = float(result[GRAD_NORM] or 0)
        steps += 1
        if steps == spec["steps"]:
            answer |= {"peak_bytes": memory.peak(), "built_bytes": memory.built}
            answer |= held(*given(args, kwargs))
        if steps > untimed:
            turns.tell(answer)
        return result

    def given(args, kwargs):
        bound = inspect.signature(train_step).bind(*args, **kwargs).arguments
        return list(bound["model"]), bound["optimizer"]

    training.setup_model_and_optimizer = lambda *args, **kwargs: compat.call_with_pre_wrap_hook(
        build, args, kwargs, bare
    )
    training.train_step = timed_step
    from megatron_moe_inject.host import gpt_entry

    gpt_entry.main()


if __name__ == "__main__":
    main()
