"""A step's teacher forward, shared by ranks that hold the same sequences.

The tensor- and context-parallel ranks of the last pipeline stage all need the teacher's states
of the same sequences, and each holds the whole teacher. Repeating the forward on each of them
would cost TP x CP times the work; exchanging states costs one all-gather of n * s * h_t values.
Where all stages of the pipeline hold the teacher, each of these ranks shares its part further with
those at its place in the other stages (``SampleWork``).

Shapes: n sequences, s sequence length, h_t teacher hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist

from megatron_moe_inject.teachers.base import Teacher
from megatron_moe_inject.teachers.spread import MAX_SEQUENCES, Loads, pass_size


def shared_forward(
    teacher: Teacher,
    tokens: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    *,
    group: dist.ProcessGroup | None,
    max_sequences: int = MAX_SEQUENCES,
    layers: Sequence[int] = (),
) -> list[torch.Tensor]:
    """The teacher's states of n sequences, ``[n, s] -> [n, s, h_t]`` each, on every rank.

    Rank r of ``group`` runs the sequences ``[r * q, (r + 1) * q)`` with q = ceil(n / size), at
    most ``max_sequences`` at a time, which bounds the activations.

    Args:
        teacher: the same teacher on every rank.
        tokens: ``[n, s]`` int64, equal on every rank of the group; n may be 0.
        position_ids: ``[n, s]``, or None to count from 0.
        attention_mask: bool ``[n, 1, s, s]``, or ``[1, 1, s, s]`` for all sequences alike, True
            where attention is forbidden; None for causal attention.
        group: ranks that share the work; None runs everything here.
        max_sequences: sequences in one forward pass.
        layers: teacher layers whose states are wanted besides.

    Returns:
        Pre-head states, then those after each of ``layers``, in the teacher's dtype, without a
        graph, in the order of ``tokens``.

    Collectives: those of ``Teacher.passes``, also where n is 0; one all-gather of ``q * s * h_t``
    values per rank over ``group`` for each of the returned tensors, none if the group has one rank
    or n is 0.
    """
    assert max_sequences > 0, max_sequences
    count, length = tokens.shape
    size = 1 if group is None else group.size()
    share = -(-count // size)
    first = 0 if group is None else min(group.rank() * share, count)
    last = min(first + share, count)

    parts = _in_passes(
        teacher, tokens, position_ids, attention_mask, layers, first, last, max_sequences
    )
    empty = teacher.head_weight(0, 0).new_empty(0, length, teacher.hidden_size)
    if count == 0:
        return [empty] * (1 + len(layers))
    gathered = []
    for layer_parts in zip(*parts, strict=True) if parts else [()] * (1 + len(layers)):
        gathered.append(_gathered(torch.cat([*layer_parts, empty]), count, group))
    return gathered


def _in_passes(
    teacher: Teacher,
    tokens: torch.Tensor,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    layers: Sequence[int],
    first: int,
    last: int,
    size: int,
) -> list[list[torch.Tensor]]:
    """States of the sequences ``[first, last)`` by pass, ``size`` of them at a time."""
    parts, starts = [], range(first, last, size)
    with teacher.passes(len(starts)):
        for start in starts:
            part = slice(start, min(start + size, last))
            positions = None if position_ids is None else position_ids[part]
            mask = attention_mask
            if mask is not None and mask.shape[0] == len(tokens):
                mask = mask[part]
            parts.append(teacher.states(tokens[part], positions, mask, layers))
    return parts


def _gathered(mine: torch.Tensor, count: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """This rank's part ``[q or fewer, s, h_t]`` with those of the others, ``[n, s, h_t]``."""
    if group is None or group.size() == 1:
        return mine
    share = -(-count // group.size())
    padded = mine.new_zeros(share, *mine.shape[1:])
    padded[: len(mine)] = mine
    everything = mine.new_empty(group.size() * share, *mine.shape[1:])
    dist.all_gather_into_tensor(everything, padded, group=group)
    return everything[:count]


class SampleWork:
    """Which stage of a pipeline runs which samples of a step, at one TP x CP place.

    The place has the sequences ``[r * q, (r + 1) * q)``, as of ``shared_forward``, and its stages
    one after the other the next of them, in passes of ``pass_size``.

    Args:
        count: n, samples of the step.
        length: s.
        place: r, and how many there are.
        loads: what the stages have to do already; this work is added.
        ratio: see ``spread.sequences_by_stage``.
    """

    def __init__(
        self, count: int, length: int, place: tuple[int, int], loads: Loads, ratio: float
    ) -> None:
        rank, ranks = place
        share = -(-count // ranks)
        first = min(rank * share, count)
        own = min(first + share, count) - first
        self._count, self._length = count, length
        self._size = pass_size(own, loads.stages, length)
        self._parts = loads.share(own, length, ratio)
        self._bounds = list(pairwise(accumulate(self._parts, initial=first)))

    def tokens(self, stage: int) -> tuple[int, ...]:
        """``(k, s)`` of a stage's k samples."""
        return self._parts[stage], self._length

    def sequences(self, stage: int) -> float:
        """How many samples a stage runs."""
        return self._parts[stage]

    def shapes(self, stage: int, inputs: int) -> list[tuple[int, ...]]:
        """Of a stage's ``inputs``: tokens, and if there are more positions and masks."""
        tokens = self.tokens(stage)
        return [tokens, tokens, (tokens[0], 1, self._length, self._length)][:inputs]

    def inputs(self, stage: int, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A stage's rows of what a teacher reads of n samples."""
        return [tensor[slice(*self._bounds[stage])] for tensor in inputs]

    def run(
        self, stage: int, teacher: Teacher, inputs: Sequence[torch.Tensor], layers: Sequence[int]
    ) -> list[torch.Tensor]:
        """States of a stage's ``inputs``, ``[k, s, h_t]`` for the head and each of ``layers``;
        empty without any. Collectives: those of ``Teacher.passes``."""
        tokens, *others = inputs
        positions, mask = others or (None, None)
        count = self._parts[stage]
        parts = _in_passes(teacher, tokens, positions, mask, layers, 0, count, self._size)
        return [torch.cat(layer_parts) for layer_parts in zip(*parts, strict=True)]

    def together(self, mine: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        """All states ``[n, s, h_t]`` of this place's, ``[q, s, h_t]`` stage by stage.

        Collectives: one all-gather over ``group``, the ranks of the other places, as of
        ``shared_forward``.
        """
        return _gathered(mine, self._count, group) if self._count else mine
