"""What bytes of a store say about tokens, as a ``Target``: some of its ids, or its states.

Shapes: k samples, s sequence (this context-parallel rank's part), w bytes of a row, v vocabulary, p
tensor-parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from megatron_moe_inject.losses.spec import LogitTransform
from megatron_moe_inject.losses.target import Dense, Sparse, Target
from megatron_moe_inject.teachers.store.row_format import RowFormat
from megatron_moe_inject.teachers.store.state_format import StateFormat


class Spoken(Protocol):
    """Makes a target of rows."""

    @property
    def layout(self) -> RowFormat | StateFormat:
        """Of the rows."""
        ...

    @property
    def tp_group(self) -> dist.ProcessGroup | None:
        """Shards its head over the vocabulary; None if it has none."""
        ...

    def target(self, content: Tensor, counts: Tensor, *, at_one: bool = False) -> Target:
        """Of bytes ``[k, s, w]`` and numbers of ids ``[k, s]``, tensors per token ``[k, s, ...]``.

        Args:
            at_one: at temperature 1 and not at the one that is distilled, where that is known.

        No collective and no host synchronisation.
        """
        ...


@dataclass(frozen=True)
class SpokenIds:
    """Ids with their probabilities, or that were drawn.

    Attributes:
        layout: of the rows.
        place: of the temperature among the store's.
        temperature: at which it is distilled.
        tail: see ``losses.target.Sparse``.
    """

    layout: RowFormat
    place: int
    temperature: float
    tail: str
    tp_group: dist.ProcessGroup | None = None

    def target(self, content: Tensor, counts: Tensor, *, at_one: bool = False) -> Target:
        """See ``Spoken``."""
        shape = counts.shape
        rows = self.layout.decode(content.flatten(0, 1), counts.flatten())
        label = None if rows.label is None else rows.label.view(*shape, 1)
        ids, drawn = rows.ids.unflatten(0, shape), self.tail == "sample"
        if at_one and not drawn:
            log_probs = rows.at(0, 1.0).view(ids.shape)
            return Sparse(ids, log_probs, self.tail, label_log_probs=label)
        log_probs = rows.at(self.place, self.temperature).view(ids.shape)
        unit = None
        if self.temperature != 1 and not drawn:
            unit = rows.at(0, 1.0).view(ids.shape)
        return Sparse(ids, log_probs, self.tail, self.temperature, unit, label)


@dataclass(frozen=True)
class SpokenStates:
    """Hidden states, of which the head makes logits.

    Attributes:
        layout: of the rows.
        head: ``[v/p, h_t]``, this rank's rows.
        transform: what makes logits of the product.
        tp_group: shards the head; None if it is whole.
    """

    layout: StateFormat
    head: Tensor
    transform: LogitTransform
    tp_group: dist.ProcessGroup | None

    def target(self, content: Tensor, counts: Tensor, *, at_one: bool = False) -> Target:
        """See ``Spoken``."""
        states = self.layout.states(content.flatten(0, 1))
        return Dense(states.unflatten(0, counts.shape), self.head, self.transform)
