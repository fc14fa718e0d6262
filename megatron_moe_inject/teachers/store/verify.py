"""Whether a store says what its teacher says: the teacher runs again over some documents.

How far the store is from the teacher stands beside how far the teacher is from itself, in passes of
other sizes, whose sums are rounded otherwise: what is no larger is no fault of the store. Both are
KL divergences of the outcomes that a store knows, its ids and one for all others, or of states all
ids. Of drawn ids no token tells how far they are from their teacher.

Shapes: t tokens, o outcomes: k ids of a token and the rest, or all v.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_moe_inject.teachers.store.produce import Producer
from megatron_moe_inject.teachers.store.reader import Store
from megatron_moe_inject.teachers.store.row_format import RowFormat
from megatron_moe_inject.teachers.store.state_format import StateFormat

_CHUNK = 256
"""Tokens whose logits exist at once."""


@dataclass(frozen=True)
class Faithfulness:
    """How far a store is from its teacher.

    Attributes:
        documents: that were compared.
        store: [t] KL(teacher || store) of each token, in nats.
        itself: [t] KL(teacher || teacher again).
        same_top: share of tokens whose most likely id is the same.
    """

    documents: int
    store: Tensor
    itself: Tensor
    same_top: float

    def told(self) -> str:
        """In one line."""
        if not len(self.store):
            return "verified: no document has two tokens"
        return (
            f"verified: {self.documents} documents, {len(self.store):,} tokens: the store is "
            f"{self.store.mean():.1e} nats from the teacher in the mean, {self.store.max():.1e} at "
            f"most; the teacher from itself {self.itself.mean():.1e} and {self.itself.max():.1e}; "
            f"the most likely id is the same at {100 * self.same_top:.2f} % of the tokens"
        )


def verify(
    store: Store,
    producers: tuple[Producer, Producer],
    tokens: np.ndarray,
    lengths: Sequence[int],
    places: np.ndarray,
    data: int,
) -> Faithfulness:
    """Compare.

    Args:
        store: of the teacher.
        producers: the teacher in passes of two sizes.
        tokens: of some documents of two tokens or more, one after the other.
        lengths: of each.
        places: of the tokens in the data set's file.
        data: position of the data set in the store.

    Raises:
        RecipeError: the store lacks one of the documents.
    """
    own = np.delete(np.arange(len(tokens)), np.cumsum(lengths, dtype=np.int64) - 1)
    content, counts = (torch.from_numpy(part) for part in store.read(data, places[own]))
    once, twice = (_states(producer, tokens, lengths) for producer in producers)
    producer, same = producers[0], []
    of_store, of_itself = [torch.zeros(0)], [torch.zeros(0)]
    for begin in range(0, len(own), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        first, second = producer.log_probs(once[part]), producer.log_probs(twice[part])
        if isinstance(store.layout, StateFormat):
            states = store.layout.states(content[part].to(first.device))
            stored = producer.log_probs(states)
            same.append(stored.argmax(-1) == first.argmax(-1))
        else:
            assert isinstance(store.layout, RowFormat), "chunks are verified by themselves"
            rows = store.layout.decode(content[part], counts[part])
            rows = rows.changed(operator.methodcaller("to", first.device))
            stored = _outcomes(rows.at(0, 1.0), rows.log_rest[:, 0])
            tops = rows.ids.gather(1, rows.log_probs.argmax(-1, keepdim=True)).squeeze(1)
            same.append(tops == first.argmax(-1))
            first, second = _of_ids(first, rows.ids), _of_ids(second, rows.ids)
        of_store.append(_kl(first, stored).cpu())
        of_itself.append(_kl(first, second).cpu())
    share = float(torch.cat(same).float().mean()) if same else 1.0
    return Faithfulness(len(lengths), torch.cat(of_store), torch.cat(of_itself), share)


def _states(producer: Producer, tokens: np.ndarray, lengths: Sequence[int]) -> Tensor:
    """The teacher's states [t, h_t], by row."""
    parts = [(said.rows, said.states) for said in producer.states(tokens, lengths)]
    if not parts:
        return torch.zeros(0, 1)
    order = torch.from_numpy(np.argsort(np.concatenate([rows for rows, _ in parts])))
    states = torch.cat([states for _, states in parts])
    return states[order.to(states.device)]


def _of_ids(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Of a teacher's [t, v] the outcomes [t, k + 1] of ids."""
    used = ids >= 0
    ids = torch.where(used, ids, ids[:, :1])
    kept = log_probs.gather(1, ids).masked_fill(~used, -torch.inf)
    # The rest is summed over its own ids: as 1 - the others it would be their rounding.
    return _outcomes(kept, log_probs.scatter(1, ids, -torch.inf).logsumexp(-1))


def _outcomes(log_probs: Tensor, log_rest: Tensor) -> Tensor:
    return torch.cat([log_probs, log_rest[:, None]], 1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL [t] of outcomes [t, k + 1], as the sum of a log(a / b) - a + b, no term of it negative."""
    log_p, log_q = log_p.double(), log_q.double()
    p, q = log_p.exp(), log_q.exp()
    gap = (log_p - log_q).masked_fill(p == 0, 0.0)
    return (p * gap - p + q).sum(-1)
