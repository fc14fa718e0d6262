"""A teacher's forward over packed samples, each document by itself.

A document of a pack becomes a row of its own, filled up at its end, so that its positions count
from 0 and nothing of another document is seen. This is exact for every causal model, whatever its
attention, positions or windows, needs no mask, and a prefix stands in front of each document.
Rows of about the same length go together: none is filled up to more than twice its length. What
comes back is at the places of the samples again.

Shapes: k samples, s sequence length, h_t teacher hidden, r rows of one pass, m their length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_moe_inject.teachers.base import Teacher
from megatron_moe_inject.teachers.forward import MAX_SEQUENCES
from megatron_moe_inject.teachers.fp8 import LENGTH_MULTIPLE


@dataclass(frozen=True)
class Rows:
    """Documents that go through the teacher together.

    Attributes:
        length: m.
        documents: first token, among those of all samples, and length of each.
    """

    length: int
    documents: tuple[tuple[int, int], ...]

    @property
    def cost(self) -> int:
        """Tokens of the pass, those that fill rows up included."""
        return self.length * len(self.documents)


def plan_rows(lengths: Sequence[Sequence[int]], ranks: int, max_tokens: int) -> list[list[Rows]]:
    """Which rank runs which documents, in passes; the same wherever it is asked.

    Args:
        lengths: those of the documents of each sample, in order.
        ranks: that share the work.
        max_tokens: of one pass; a longer document has one of its own.
    """
    documents, first = [], 0
    for length in (length for sample in lengths for length in sample):
        documents.append((first, length))
        first += length
    documents.sort(key=lambda document: -document[1])
    most = min(max_tokens, -(-first // ranks))
    passes: list[Rows] = []
    while documents:
        longest = documents[0][1]
        length = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        fits = max(1, most // length)
        count = next(
            (i for i, (_, own) in enumerate(documents[:fits]) if 2 * own < longest),
            min(fits, len(documents)),
        )
        passes.append(Rows(length, tuple(documents[:count])))
        documents = documents[count:]
    shares: list[list[Rows]] = [[] for _ in range(ranks)]
    for rows in sorted(passes, key=lambda rows: -rows.cost):
        min(shares, key=lambda share: sum(own.cost for own in share)).append(rows)
    return shares


def document_forward(
    teacher: Teacher,
    tokens: torch.Tensor,
    lengths: Sequence[Sequence[int]],
    *,
    group: dist.ProcessGroup | None,
    layers: Sequence[int] = (),
    max_sequences: int = MAX_SEQUENCES,
) -> list[torch.Tensor]:
    """The teacher's states of k samples, ``[k, s] -> [k, s, h_t]`` each, on every rank.

    Args:
        teacher: the same teacher on every rank.
        tokens: ``[k, s]`` int64, equal on every rank of the group; k may be 0.
        lengths: by sample, those of its documents, s in sum, on the host.
        group: ranks that share the work; None runs everything here.
        layers: teacher layers whose states are wanted besides.
        max_sequences: so many times s tokens are in one forward pass.

    Returns:
        As of ``forward.shared_forward``.

    Collectives: one all-gather over ``group`` for each of the returned tensors, of as many tokens
    as the fullest rank has; none if the group has one rank or k is 0.
    """
    count, length = tokens.shape
    empty = teacher.head_weight(0, 0).new_empty(0, teacher.hidden_size)
    if count == 0:
        return [empty.view(0, length, teacher.hidden_size)] * (1 + len(layers))
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    shares = plan_rows(lengths, size, max_sequences * length)
    flat = tokens.flatten()
    parts: list[list[torch.Tensor]] = [[empty] for _ in range(1 + len(layers))]
    for rows in shares[rank]:
        states = teacher.states(flat[_places(rows, flat.device)], layers=layers)
        real = _real(rows, flat.device)
        for part, layer_states in zip(parts, states, strict=True):
            part.append(layer_states.flatten(0, 1).index_select(0, real))
    totals = [sum(own for rows in share for _, own in rows.documents) for share in shares]
    order = _order(shares, max(totals), flat.device)
    gathered = []
    for part in parts:
        mine = torch.cat(part)
        if size > 1:
            padded = mine.new_zeros(max(totals), teacher.hidden_size)
            padded[: len(mine)] = mine
            mine = padded.new_empty(size * max(totals), teacher.hidden_size)
            dist.all_gather_into_tensor(mine, padded, group=group)
        gathered.append(mine.index_select(0, order).view(count, length, -1))
    return gathered


def _places(rows: Rows, device: torch.device) -> torch.Tensor:
    """Of ``[r, m]`` tokens the place among those of all samples; a row is filled up with its last
    token, which nobody sees."""
    first = torch.tensor([document[0] for document in rows.documents]).unsqueeze(1)
    last = torch.tensor([own - 1 for _, own in rows.documents]).unsqueeze(1)
    places = first + torch.minimum(torch.arange(rows.length), last)
    return places.to(device, non_blocking=True)


def _real(rows: Rows, device: torch.device) -> torch.Tensor:
    """Places of the documents' tokens in ``[r m]``, document by document."""
    starts = range(0, rows.cost, rows.length)
    places = [
        torch.arange(start, start + own)
        for start, (_, own) in zip(starts, rows.documents, strict=True)
    ]
    return torch.cat(places).to(device, non_blocking=True)


def _order(shares: Sequence[Sequence[Rows]], most: int, device: torch.device) -> torch.Tensor:
    """Where each token of the samples is among the ranks' results, ``most`` places for each."""
    tokens, places = [], []
    for rank, share in enumerate(shares):
        at = rank * most
        for first, own in (document for rows in share for document in rows.documents):
            tokens.append(torch.arange(first, first + own))
            places.append(torch.arange(at, at + own))
            at += own
    token = torch.cat(tokens)
    order = torch.empty_like(token)
    order[token] = torch.cat(places)
    return order.to(device, non_blocking=True)
