"""Which domain the tokens are of that a layer sees, where domains have adapters of their own.

A step tells the domain of every sample. Attention, dense MLPs, shared experts and routers see the
tokens of their own rank in the order of the data, so each such place finds its tokens by the
micro-batch that passes it (``host.clock``), also when it is recomputed. Experts get rows from other
ranks: one number for each row, the domain of its token, is sent after the rows through the token
dispatcher, once per layer and pass (``dispatched``).

Shapes: b samples of a micro-batch, l this rank's part of the sequence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from megatron_moe_inject.adapters.blocks import LabelsAt, LabelsOfRows
from megatron_moe_inject.adapters.dispatched import dispatched
from megatron_moe_inject.adapters.uses import DISPATCHED
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.clock import ChunkClock, Passages
from megatron_moe_inject.host.labels import GENERAL
from megatron_moe_inject.host.megatron_types import Chunk, MegatronModule
from megatron_moe_inject.host.model_parts import decoder_layers, mlp_of
from megatron_moe_inject.host.own_tokens import OwnTokens
from megatron_moe_inject.host.step import Step, StepPart
from megatron_moe_inject.host.to_device import to_device
from megatron_moe_inject.host.wrap import Call, wrap_method


class ChunkLabels:
    """Tells the places of one bare model chunk which domain their tokens are of.

    Args:
        chunk: the chunk.
        packed: whether a micro-batch is one row of its samples; see ``host.own_tokens``.
    """

    def __init__(self, chunk: Chunk, *, packed: bool) -> None:
        self._chunk = chunk
        self._tokens = OwnTokens(
            compat.process_groups(chunk),
            sequence_parallel=bool(chunk.config.sequence_parallel),
            packed=packed,
        )
        self._clock = ChunkClock(chunk)
        self._places: list[Passages] = []
        self._rows: dict[int, _ExpertRows] = {}
        self._labels: torch.Tensor | None = None
        self._on = True

    @property
    def expert_layers(self) -> Collection[int]:
        """0-based global layers whose experts are told of their rows."""
        return self._rows.keys()

    @property
    def _device(self) -> torch.device:
        return next(self._chunk.parameters()).device

    def begin(self, step: Step) -> None:
        """Start a step. No collective."""
        labels = to_device(step.labels, self._device)
        length = step.sequence_length // self._chunk.config.context_parallel_size
        self._labels = self._tokens.of_samples(labels, length)
        self._clock.reset()
        for place in self._places:
            place.reset()

    def close(self) -> None:
        """The step is over: no pass has labels until the next."""
        self._labels = None

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, no place asks, and forward passes are none of the step's."""
        self._on = False
        try:
            with self._clock.paused():
                yield
        finally:
            self._on = True

    def at_place(self) -> LabelsAt:
        """For one more place that the tokens of this rank pass."""
        place = Passages(self._clock)
        self._places.append(place)

        def labels(shape: Sequence[int]) -> torch.Tensor:
            pair = (shape[0], shape[1] if len(shape) > 1 else 1)
            return self._passing(place, pair).reshape(tuple(shape))

        return labels

    def of_experts(self, layer: int) -> LabelsOfRows:
        """For the rows of the local experts of a 0-based global layer."""
        if layer not in self._rows:
            (found,) = (x for x in decoder_layers(self._chunk) if x.layer_number - 1 == layer)
            self._rows[layer] = _ExpertRows(mlp_of(found), self.at_place(), lambda: self._on)
        return self._rows[layer].of

    def _passing(self, place: Passages, pair: tuple[int, int]) -> torch.Tensor:
        """Labels ``[l, b]`` of the tokens that pass a place now."""
        if self._device.type == "meta":  # a plan, whose tokens are none
            return torch.empty(pair, dtype=torch.int64, device="meta")
        assert self._labels is not None, "forward passes are those of steps"
        micro_batch, _ = place.passing()
        return self._tokens.seen(self._labels[micro_batch], pair)


class _ExpertRows:
    """The domains of the rows that the experts of one MoE layer on this rank get.

    Args:
        layer: Megatron's ``MoELayer``.
        labels_at: the place where its tokens are dispatched.
        is_on: whether adapters act now.
    """

    def __init__(
        self, layer: MegatronModule, labels_at: LabelsAt, is_on: Callable[[], bool]
    ) -> None:
        self._labels_at = labels_at
        self._is_on = is_on
        self._by_expert: tuple[torch.Tensor, ...] = ()
        self._experts = list(layer.local_expert_indices)
        self._dispatcher = layer.token_dispatcher
        wrap_method(self._dispatcher, DISPATCHED, self._dispatch)

    def _dispatch(self, call: Call) -> Any:
        """The dispatcher's last step before the experts: rows, the number of each local expert's,
        and their gates. Collectives besides: those of ``dispatched``."""
        result = call()
        if self._is_on():
            labels = self._labels_at(self._dispatcher.hidden_shape[:-1]).flatten()
            _, counts, _ = result  # on the host, where experts read them
            self._by_expert = dispatched(self._dispatcher, labels, counts).split(counts.tolist())
        return result

    def of(self, expert: int, count: int) -> torch.Tensor:
        """Of an expert's rows; those that pad them are of no domain."""
        labels = self._by_expert[self._experts.index(expert)]
        return F.pad(labels, (0, count - len(labels)), value=GENERAL)


class LabelledStep(StepPart):
    """Tells all chunks of a rank which domain the samples of a step are of.

    Args:
        chunks: what tells their places.
        beside: another part of the step, ``None`` without.
    """

    def __init__(self, chunks: Sequence[ChunkLabels], beside: StepPart | None) -> None:
        self._chunks = chunks
        self._beside = beside or StepPart()

    @contextlib.contextmanager
    def of_pass(self, step: Step, labels: torch.Tensor) -> Iterator[None]:
        """Inside, forward passes are those of other micro-batches than the step's, which begins
        anew behind.

        Args:
            labels: of their samples, ``[m, b]`` on the host.
        """
        try:
            for chunk in self._chunks:
                chunk.begin(replace(step, labels=labels))
            yield
        finally:
            for chunk in self._chunks:
                chunk.begin(step)

    def begin(self, step: Step) -> None:
        """Collectives: those of the part beside."""
        for chunk in self._chunks:
            chunk.begin(step)
        self._beside.begin(step)

    def failed(self, error: Exception) -> None:
        """See ``StepPart``."""
        self._beside.failed(error)

    def close(self) -> None:
        """The step is over."""
        for chunk in self._chunks:
            chunk.close()
        self._beside.close()

    def end(self, step: Step, reports: Any) -> None:
        """Collectives: those of the part beside."""
        self._beside.end(step, reports)
