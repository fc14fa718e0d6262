"""``moe-inject store-teacher`` of a teacher with another tokenizer: chunks of documents as rows.

The teacher reads each document by itself as its own ids, behind its own prefix; one that is longer
than the context goes through in spans, each of which begins with some of its tokens that the one
before has read. What is kept of each of the student's tokens is which chunk its label belongs to
and the log-probability of that chunk (``store.chunk_format``).

Shapes: n tokens of some documents, r rows of them, t tokens that the teacher reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_moe_inject.teachers.align.reading import Reader, Span
from megatron_moe_inject.teachers.align.scores import Scores
from megatron_moe_inject.teachers.store.chunk_format import ChunkFormat, ChunkRows, rows_of
from megatron_moe_inject.teachers.store.manifest import StorePlan
from megatron_moe_inject.teachers.store.produce import windows
from megatron_moe_inject.teachers.store.reader import Store
from megatron_moe_inject.teachers.store.writer import Content


class ChunkProducer:
    """Says how likely a teacher finds the chunks of documents, as ``store.produce.Producer`` says
    which ids.

    Args:
        reader: makes what the teacher reads of documents.
        scores: says how likely it finds that.
        plan: what is kept.
        pass_tokens: of one forward pass.
    """

    def __init__(self, reader: Reader, scores: Scores, plan: StorePlan, pass_tokens: int) -> None:
        layout = plan.row_format
        assert isinstance(layout, ChunkFormat), "a plan of chunks"
        self._reader = reader
        self._scores = scores
        self._plan = plan
        self._layout = layout
        self._pass_tokens = pass_tokens

    def rows(
        self, tokens: np.ndarray, lengths: Sequence[int], *, data: int = 0, first_token: int = 0
    ) -> Content:
        """Rows of some documents, in order; arguments as of ``Producer.rows``.

        Raises:
            ValueError: log-probabilities that are none.
        """
        known, rows = self.chunks(tokens, lengths)
        content = self._layout.encode(tokens[known], rows)
        return content, np.ones(len(content), np.int64)

    def chunks(self, tokens: np.ndarray, lengths: Sequence[int]) -> tuple[np.ndarray, ChunkRows]:
        """Places [r] of the tokens of some documents that have a label, and what is known of
        these."""
        reading = self._reader.read_documents(tokens, lengths, self._spans)
        sums = np.zeros(len(tokens) + 1)
        if len(reading.lengths):
            scores = self._scores(reading, self._pass_tokens).double().cpu().numpy()
            np.add.at(sums, reading.numbers, scores)
        places = reading.places[0]
        rows = rows_of(places, sums[np.where(places >= 0, places, len(tokens))])
        known = np.delete(np.arange(len(tokens)), _lasts(lengths))
        return known, ChunkRows(*(part[known] for part in rows))

    def _spans(self, length: int) -> Iterator[Span]:
        for window in windows([length], self._plan.context, self._plan.overlap):
            yield Span(window.begin, window.end, window.first)


def _lasts(lengths: Sequence[int]) -> np.ndarray:
    """The last token of each document that has any."""
    own = np.array(lengths, np.int64)
    return np.cumsum(own)[own > 0] - 1


@dataclass(frozen=True)
class ChunkFaithfulness:
    """How far a store is from its teacher.

    Attributes:
        documents: that were compared.
        store: by chunk, how far its log-probability in the store is from the teacher's, in nats.
        itself: how far the teacher is from itself, in passes of another size.
        others: labels that belong to another chunk than in the store.
    """

    documents: int
    store: np.ndarray
    itself: np.ndarray
    others: int

    def told(self) -> str:
        """In one line."""
        if not len(self.store):
            return "verified: no document has a chunk of which anything is told"
        return (
            f"verified: {self.documents} documents, {len(self.store):,} chunks: the store is "
            f"{self.store.mean():.1e} nats from the teacher in the mean, {self.store.max():.1e} at "
            f"most; the teacher from itself {self.itself.mean():.1e} and {self.itself.max():.1e}; "
            f"{self.others} labels are in another chunk"
        )


def verify_chunks(
    store: Store,
    producers: tuple[ChunkProducer, ChunkProducer],
    tokens: np.ndarray,
    lengths: Sequence[int],
    places: np.ndarray,
    data: int,
) -> ChunkFaithfulness:
    """Compare; arguments and errors as of ``store.verify.verify``."""
    (known, once), (_, twice) = (producer.chunks(tokens, lengths) for producer in producers)
    layout = store.layout
    assert isinstance(layout, ChunkFormat), "a store of chunks"
    content, _ = store.read(data, places[known])
    stored = layout.decode(content)
    differs = [a != b for a, b in zip(stored[:3], once[:3], strict=True)]
    same = stored.first & once.first
    return ChunkFaithfulness(
        len(lengths),
        np.abs(stored.log_probs - once.log_probs)[same],
        np.abs(twice.log_probs - once.log_probs)[same],
        int(np.logical_or.reduce(differs).sum()),
    )
