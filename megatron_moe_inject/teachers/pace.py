"""How long a teacher takes beside the student, measured in the first steps and agreed once.

What counts is the time of a sequence through a teacher, in forwards of a micro-batch through one of
the student's model chunks: by so much a pipeline stage waits longer than the one before. The first
step of a run only warms up. The means over all ranks of what the next ones take are agreed before
the third, so that all ranks share the work alike from then on. A teacher that had nothing to read
is asked for again before the fifth, ninth, 17th ... step.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject.host.megatron_types import Chunk
from megatron_moe_inject.teachers.spread import UNKNOWN

KEPT = 64
"""Times that are kept of one kind, the latest."""


class Pace:
    """Measures on this rank, and knows what all ranks have agreed on.

    Args:
        chunks: this rank's bare model chunks for whose forward another stage waits.
        names: of the teachers that are shared over stages by what is measured.
        device: where both run.
    """

    def __init__(self, chunks: Sequence[Chunk], names: Sequence[str], device: torch.device) -> None:
        self._device = device
        self._ratios = dict.fromkeys(names, UNKNOWN)
        self._steps = 0
        self._forwards: deque[_Span] = deque(maxlen=KEPT)
        self._passes: dict[str, deque[tuple[_Span, float]]] = {
            name: deque(maxlen=KEPT) for name in names
        }
        self._agreed = not names
        self._handles = (
            []
            if self._agreed
            else [
                *(chunk.register_forward_pre_hook(self._enter) for chunk in chunks),
                *(chunk.register_forward_hook(self._leave) for chunk in chunks),
            ]
        )

    @property
    def names(self) -> tuple[str, ...]:
        """As given."""
        return tuple(self._ratios)

    def ratio(self, name: str) -> float:
        """See ``spread.sequences_by_stage``; the same on every rank."""
        return self._ratios[name]

    @property
    def measuring(self) -> bool:
        """Whether this step is measured."""
        return not self._agreed and self._steps > 1

    def begin(self, training: bool) -> None:
        """Start a step; those that do not train are not measured, and count for nothing.

        Collectives: before some steps (see above) until all teachers are known, one all-reduce of
        two float64 and two for each teacher over the whole world, which the host waits for.
        """
        if self._agreed or not training:
            return
        self._steps += 1
        done = self._steps - 1
        if done > 1 and not done & (done - 1):
            self._agree()

    def _agree(self) -> None:
        unknown = [name for name, ratio in self._ratios.items() if ratio == UNKNOWN]
        spans = [[span.seconds for span in self._forwards]]
        spans += [[span.seconds / own for span, own in self._passes[name]] for name in unknown]
        medians = [(statistics.median(s), 1.0) if s else (0.0, 0.0) for s in spans]
        sums = torch.tensor(medians, dtype=torch.float64, device=self._device)
        dist.all_reduce(sums)
        (forward, forwards), *passes = sums.tolist()
        for name, (seconds, ranks) in zip(unknown, passes, strict=True):
            if ranks and forward:
                self._ratios[name] = (seconds / ranks) / (forward / forwards)
        self._forwards.clear()
        for name in unknown:
            self._passes[name].clear()
        self._agreed = UNKNOWN not in self._ratios.values()
        if self._agreed:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    @contextlib.contextmanager
    def running(self, name: str, sequences: float) -> Iterator[None]:
        """Around a teacher's forward of so many sequences; of one that is not to be measured,
        too."""
        if not (self.measuring and sequences and name in self._ratios):
            yield
            return
        span = _Span(self._device)
        yield
        span.end()
        self._passes[name].append((span, sequences))

    def _enter(self, *_: Any) -> None:
        if self.measuring and torch.is_grad_enabled():
            self._forwards.append(_Span(self._device))

    def _leave(self, *_: Any) -> None:
        if self.measuring and torch.is_grad_enabled() and self._forwards:
            self._forwards[-1].end()


class _Span:
    """A time on the device, from now to ``end``; nothing waits until it is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._begin, self._end = self._now(), None

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def end(self) -> None:
        """Now."""
        self._end = self._now()

    @property
    def seconds(self) -> float:
        """From begin to end; waits until that has come."""
        assert self._end is not None, "a span is asked for when it has ended"
        if not self._on_gpu:
            return self._end - self._begin
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1000
