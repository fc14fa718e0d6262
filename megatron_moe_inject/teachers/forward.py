"""A step's teacher forward, shared by ranks that hold the same sequences.

The tensor- and context-parallel ranks of the last pipeline stage all need the teacher's states
of the same sequences, and each holds the whole teacher. Repeating the forward on each of them
would cost TP x CP times the work; exchanging states costs one all-gather of n * s * h_t values.

Shapes: n sequences, s sequence length, h_t teacher hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_moe_inject.teachers.base import Teacher

MAX_SEQUENCES = 4


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

    Collectives: one all-gather of ``q * s * h_t`` values per rank over ``group`` for each of the
    returned tensors; none if the group has one rank or n is 0.
    """
    assert max_sequences > 0, max_sequences
    count, length = tokens.shape
    size = 1 if group is None else group.size()
    share = -(-count // size)
    first = 0 if group is None else min(group.rank() * share, count)
    last = min(first + share, count)

    parts = []
    for start in range(first, last, max_sequences):
        part = slice(start, min(start + max_sequences, last))
        positions = None if position_ids is None else position_ids[part]
        mask = attention_mask
        if mask is not None and mask.shape[0] == count:
            mask = mask[part]
        parts.append(teacher.states(tokens[part], positions, mask, layers))
    empty = teacher.head_weight(0, 0).new_empty(0, length, teacher.hidden_size)
    if count == 0:
        return [empty] * (1 + len(layers))
    gathered = []
    for layer_parts in zip(*parts, strict=True) if parts else [()] * (1 + len(layers)):
        mine = torch.cat([*layer_parts, empty])
        if size > 1:
            padded = empty.new_zeros(share, length, teacher.hidden_size)
            padded[: last - first] = mine
            everything = empty.new_empty(size * share, length, teacher.hidden_size)
            dist.all_gather_into_tensor(everything, padded, group=group)
            mine = everything[:count]
        gathered.append(mine)
    return gathered
