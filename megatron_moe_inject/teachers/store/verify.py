"""Whether a store says what its teacher says: the teacher runs again over some documents.

How far the store is from the teacher stands beside how far the teacher is from itself, in passes of
other sizes, whose sums are rounded otherwise: what is no larger is no fault of the store. Both are
KL divergences of the outcomes that a store knows, its ids and one for all others.

Shapes: t tokens, k ids of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_moe_inject.teachers.store.produce import Producer
from megatron_moe_inject.teachers.store.reader import Store
from megatron_moe_inject.teachers.store.row_format import Rows


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
    content, counts = store.read(data, places[own])
    rows = store.layout.decode(torch.from_numpy(content), torch.from_numpy(counts))
    stored = _outcomes(rows.at(0, 1.0), rows.log_rest[:, 0])
    once, tops = _again(producers[0], rows, tokens, lengths)
    twice, _ = _again(producers[1], rows, tokens, lengths)
    top = rows.ids.gather(1, rows.log_probs.argmax(-1, keepdim=True)).squeeze(1)
    same = float((top == tops).float().mean()) if len(own) else 1.0
    return Faithfulness(len(lengths), _kl(once, stored), _kl(once, twice), same)


def _again(
    producer: Producer, rows: Rows, tokens: np.ndarray, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The teacher's outcomes [t, k + 1] of stored ids, and its most likely ids [t]."""
    found = torch.empty(len(rows.ids), rows.ids.shape[1] + 1)
    tops = torch.empty(len(rows.ids), dtype=torch.int64)
    for places, log_probs, _ in producer.log_probs(tokens, lengths):
        at = torch.from_numpy(places)
        ids = rows.ids[at].to(log_probs.device)
        used = ids >= 0
        ids = torch.where(used, ids, ids[:, :1])
        kept = log_probs.gather(1, ids).masked_fill(~used, -torch.inf)
        # The rest is summed over its own ids: as 1 - the others it would be their rounding.
        outside = log_probs.scatter(1, ids, -torch.inf)
        tops[at] = log_probs.argmax(-1).cpu()
        found[at] = _outcomes(kept, outside.logsumexp(-1)).cpu()
    return found, tops


def _outcomes(log_probs: Tensor, log_rest: Tensor) -> Tensor:
    return torch.cat([log_probs, log_rest[:, None]], 1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL [t] of outcomes [t, k + 1], as the sum of a log(a / b) - a + b, no term of it negative."""
    log_p, log_q = log_p.double(), log_q.double()
    p, q = log_p.exp(), log_q.exp()
    gap = (log_p - log_q).masked_fill(p == 0, 0.0)
    return (p * gap - p + q).sum(-1)
