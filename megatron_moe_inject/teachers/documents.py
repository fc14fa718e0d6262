"""A teacher's forward over documents, each by itself, such as those of packed samples.

A document of a pack becomes a row of its own, filled up at its end, so that its positions count
from 0 and nothing of another document is seen. This is exact for every causal model, whatever its
attention, positions or windows, needs no mask, and a prefix stands in front of each document.
Rows of about the same length go together: none is filled up to more than twice its length. What
comes back is at the places of the samples again.

Shapes: k samples, s sequence length, h_t teacher hidden, r rows of one pass, m their length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_moe_inject.host.to_device import to_device
from megatron_moe_inject.teachers.base import Teacher
from megatron_moe_inject.teachers.fp8 import LENGTH_MULTIPLE
from megatron_moe_inject.teachers.spread import MAX_SEQUENCES, Loads, pass_size


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


def plan_rows(
    lengths: Sequence[Sequence[int]],
    ranks: int,
    max_tokens: int,
    busy: Sequence[float] | None = None,
) -> list[list[Rows]]:
    """Which rank runs which documents, in passes; the same wherever it is asked.

    The passes depend on nothing but the lengths, how many ranks there are and ``max_tokens``.

    Args:
        lengths: those of the documents of each sample, in order.
        ranks: that share the work.
        max_tokens: of one pass; a longer document has one of its own.
        busy: by rank, tokens that it has to do already; None for none.
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
    costs = [0.0] * ranks if busy is None else list(busy)
    for rows in sorted(passes, key=lambda rows: -rows.cost):
        rank = min(range(ranks), key=costs.__getitem__)
        shares[rank].append(rows)
        costs[rank] += rows.cost
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

    Collectives: those of ``Teacher.passes``, also where k is 0; one all-gather over ``group`` for
    each of the returned tensors, of as many tokens
    as the fullest rank has; none if the group has one rank or k is 0.
    """
    count, length = tokens.shape
    empty = teacher.head_weight(0, 0).new_empty(0, teacher.hidden_size)
    if count == 0:
        with teacher.passes(0):
            return [empty.view(0, length, teacher.hidden_size)] * (1 + len(layers))
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    shares = plan_rows(lengths, size, max_sequences * length)
    flat = tokens.flatten()
    parts = [[empty] * (1 + len(layers))]
    with teacher.passes(len(shares[rank])):
        for rows in shares[rank]:
            parts.append(_in_pass(teacher, rows, flat[_places(rows, flat.device)], layers))
    whole = [torch.cat(layer_parts) for layer_parts in zip(*parts, strict=True)]
    return [states.view(count, length, -1) for states in _gathered(whole, shares, group)]


def _in_pass(
    teacher: Teacher, rows: Rows, tokens: torch.Tensor, layers: Sequence[int]
) -> list[torch.Tensor]:
    """States of a pass's tokens ``[r, m]``, without those that fill rows up."""
    real = _real(rows, tokens.device)
    states = teacher.states(tokens, layers=layers)
    return [layer_states.flatten(0, 1).index_select(0, real) for layer_states in states]


def _gathered(
    parts: Sequence[torch.Tensor],
    shares: Sequence[Sequence[Rows]],
    group: dist.ProcessGroup | None,
) -> list[torch.Tensor]:
    """This rank's states ``[t, h_t]`` with those of the others, in the order of the samples."""
    totals = [_tokens(share) for share in shares]
    order = _order(shares, max(totals), parts[0].device)
    gathered = []
    for mine in parts:
        if group is not None and group.size() > 1:
            padded = mine.new_zeros(max(totals), *mine.shape[1:])
            padded[: len(mine)] = mine
            mine = padded.new_empty(len(shares) * max(totals), *mine.shape[1:])
            dist.all_gather_into_tensor(mine, padded, group=group)
        gathered.append(mine.index_select(0, order))
    return gathered


def _tokens(share: Sequence[Rows]) -> int:
    """Tokens of the documents of a share."""
    return sum(own for rows in share for _, own in rows.documents)


def document_values(
    teacher: Teacher,
    tokens: torch.Tensor,
    lengths: Sequence[int],
    value: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    group: dist.ProcessGroup | None,
    max_tokens: int,
) -> torch.Tensor:
    """One number for each token of some documents, of the teacher's states there.

    Args:
        teacher: the same teacher on every rank.
        tokens: ``[t]`` int64, one document behind the other, equal on every rank of the group.
        lengths: of the documents, on the host; there may be none.
        value: of states ``[u, h_t]`` and the places ``[u]`` of their tokens among the t: ``[u]``
            float32.
        group: ranks that share the work; None runs everything here.
        max_tokens: of one pass; a longer document has one of its own.

    Returns:
        ``[t]`` float32 on every rank.

    Collectives: those of ``Teacher.passes``, also without a document; one all-gather over ``group``
    of as many numbers as the fullest rank has tokens, none if the group has one rank or there is
    no document.
    """
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    shares = plan_rows([lengths], size, max_tokens)
    values = [torch.zeros(0, device=tokens.device)]
    with teacher.passes(len(shares[rank])):
        for rows in shares[rank]:
            places = _places(rows, tokens.device)
            (states,) = _in_pass(teacher, rows, tokens[places], ())
            values.append(value(states, places.flatten()[_real(rows, tokens.device)]))
    if not lengths:
        return values[0]
    (whole,) = _gathered([torch.cat(values)], shares, group)
    return whole


class DocumentWork:
    """Which stage of a pipeline runs which documents of a step's packed samples.

    As ``forward.SampleWork``; each rank of the pipelines of all TP x CP places has documents of
    its own (``plan_rows``).

    Args:
        lengths: by sample, those of its documents, on the host.
        length: s.
        place: among the TP x CP places, and how many there are.
        loads: what the stages have to do already; this work is added.
        ratio: see ``spread.sequences_by_stage``.
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        length: int,
        place: tuple[int, int],
        loads: Loads,
        ratio: float,
    ) -> None:
        rank, ranks = place
        stages, count = loads.stages, len(lengths)
        self._shape = (count, length)
        most = pass_size(-(-count // ranks), stages, length) * length
        busy = [start * length for start in loads.head_starts(ratio)]
        # The last stage first: where several would do, what it has run need not be sent.
        shares = plan_rows(lengths, ranks * stages, most, busy[::-1] * ranks)
        places = [shares[i * stages : (i + 1) * stages][::-1] for i in range(ranks)]
        self._own = places[rank]
        self._by_place = [[rows for share in place for rows in share] for place in places]
        costs = [[sum(rows.cost for rows in share) for share in place] for place in places]
        loads.add([max(of_stage) / length for of_stage in zip(*costs, strict=True)], ratio)

    def tokens(self, stage: int) -> tuple[int, ...]:
        """``(t,)``, tokens of a stage's documents."""
        return (_tokens(self._own[stage]),)

    def sequences(self, stage: int) -> float:
        """How much a stage runs, in samples of s tokens."""
        return sum(rows.cost for rows in self._own[stage]) / self._shape[1]

    def shapes(self, stage: int, inputs: int) -> list[tuple[int, ...]]:
        """Of a stage's ``inputs``: its rows, one after the other."""
        assert inputs == 1, "documents have their own positions"
        return [(sum(rows.cost for rows in self._own[stage]),)]

    def inputs(self, stage: int, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A stage's rows, one after the other, of the tokens ``[k, s]``."""
        (tokens,) = inputs
        flat = tokens.flatten()
        rows = [flat[_places(rows, flat.device)].flatten() for rows in self._own[stage]]
        return [torch.cat([flat[:0], *rows])]

    def run(
        self, stage: int, teacher: Teacher, inputs: Sequence[torch.Tensor], layers: Sequence[int]
    ) -> list[torch.Tensor]:
        """States ``[t, h_t]`` of a stage's ``inputs``, for the head and each of ``layers``; empty
        without any. Collectives: those of ``Teacher.passes``."""
        (tokens,) = inputs
        parts = []
        with teacher.passes(len(self._own[stage])):
            for rows in self._own[stage]:
                own, tokens = tokens[: rows.cost], tokens[rows.cost :]
                parts.append(_in_pass(teacher, rows, own.view(-1, rows.length), layers))
        return [torch.cat(layer_parts) for layer_parts in zip(*parts, strict=True)]

    def together(self, mine: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        """All states ``[k, s, h_t]`` of those of this place ``[t, h_t]``, stage by stage.

        Collectives: one all-gather over ``group``, the ranks of the other places.
        """
        if self._shape[0]:
            (mine,) = _gathered([mine], self._by_place, group)
        return mine.view(*self._shape, mine.shape[-1])


def _places(rows: Rows, device: torch.device) -> torch.Tensor:
    """Of ``[r, m]`` tokens the place among those of all samples; a row is filled up with its last
    token, which nobody sees."""
    first = torch.tensor([document[0] for document in rows.documents]).unsqueeze(1)
    last = torch.tensor([own - 1 for _, own in rows.documents]).unsqueeze(1)
    places = first + torch.minimum(torch.arange(rows.length), last)
    return to_device(places, device)


def _real(rows: Rows, device: torch.device) -> torch.Tensor:
    """Places of the documents' tokens in ``[r m]``, document by document."""
    starts = range(0, rows.cost, rows.length)
    places = [
        torch.arange(start, start + own)
        for start, (_, own) in zip(starts, rows.documents, strict=True)
    ]
    return to_device(torch.cat(places), device)


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
    return to_device(order, device)
