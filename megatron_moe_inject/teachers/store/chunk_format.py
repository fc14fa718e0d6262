"""What a store for ``align: chunks`` keeps of one token of the student's: which chunk of text its
label belongs to, and how likely the teacher found that.

    token and place (3 bytes) | log-probability of the label's chunk (2 or 4 bytes)

- the lower 21 bits: the id that stood here, as in ``row_format``;
- above: whether the label is in a chunk, whether it is the chunk's first label, and its last. So
  a reader sees where chunks begin and end, also in a sample that begins or ends inside one;
- log P of the whole chunk, at each of its labels: float16 (11 bits, to -65,504) or float32.

The teacher's own tokens and the bytes at which they begin are not kept: what training asks of them
is the sum of their log-probabilities by chunk alone.

Shapes: t rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FP16 = "fp16"
PRECISIONS = (FP16, "fp32")
_TYPES: dict[str, np.dtype] = {FP16: np.dtype("<f2"), "fp32": np.dtype("<f4")}
_ID_BITS = 21
MOST_IDS = 1 << _ID_BITS
_FRONT = 3
_IN_CHUNK, _FIRST, _LAST = (1 << (_ID_BITS + n) for n in range(3))


class ChunkRows(NamedTuple):
    """What is known of t labels.

    Attributes:
        inside: ``[t]`` bool, it belongs to a chunk.
        first, last: ``[t]`` bool, it is its chunk's first, or last, label.
        log_probs: ``[t]`` float32, of its chunk; 0 without one.
    """

    inside: np.ndarray
    first: np.ndarray
    last: np.ndarray
    log_probs: np.ndarray


@dataclass(frozen=True)
class ChunkFormat:
    """How rows of chunks are laid out; as a ``RowFormat`` for whoever moves bytes.

    Attributes:
        vocab_size: ids of the student.
        precision: of log-probabilities, one of ``PRECISIONS``.
    """

    vocab_size: int
    precision: str
    slots: int = 1

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}; use one of {', '.join(PRECISIONS)}")
        if not 1 <= self.vocab_size <= MOST_IDS:
            raise ValueError(f"{self.vocab_size} ids are not among 1 to {MOST_IDS}")

    @property
    def widest(self) -> int:
        """Bytes of a row."""
        return _FRONT + _TYPES[self.precision].itemsize

    def row_bytes(self, count: int) -> int:
        """Bytes of a row; all are alike."""
        return self.widest

    def bytes_of(self, counts: np.ndarray) -> np.ndarray:
        """``row_bytes`` of each of [t] counts."""
        return np.full(len(counts), self.widest)

    def encode(self, tokens: np.ndarray, rows: ChunkRows) -> np.ndarray:
        """Bytes [t, ``widest``] of tokens [t] and what is known of their labels.

        Raises:
            ValueError: a log-probability that is none.
        """
        if not (rows.log_probs <= 0).all():
            raise ValueError("a teacher's log-probabilities are above 0, or no numbers")
        word = tokens.astype(np.int32)
        for there, bit in zip(rows[:3], (_IN_CHUNK, _FIRST, _LAST), strict=True):
            word = word | np.where(there, bit, 0).astype(np.int32)
        kind = _TYPES[self.precision]
        values = rows.log_probs.astype(np.float32).clip(min=float(np.finfo(kind).min)).astype(kind)
        front = word.astype("<i4").view(np.uint8).reshape(-1, 4)[:, :_FRONT]
        return np.concatenate([front, values.view(np.uint8).reshape(len(word), -1)], 1)

    def _words(self, content: np.ndarray) -> np.ndarray:
        words = np.zeros((len(content), 4), np.uint8)
        words[:, :_FRONT] = content[:, :_FRONT]
        return words.view("<i4").squeeze(1)

    def tokens(self, content: Tensor) -> Tensor:
        """The tokens [t] that were read, of bytes [t, w]."""
        words = self._words(content.numpy()) & (MOST_IDS - 1)
        return torch.from_numpy(words.astype(np.int64))

    def decode(self, content: np.ndarray) -> ChunkRows:
        """What is known, of bytes [t, w]; nothing where these are zeros."""
        words = self._words(content)
        stored = np.ascontiguousarray(content[:, _FRONT : self.widest])
        values = stored.view(_TYPES[self.precision]).squeeze(1).astype(np.float32)
        inside, first, last = (words & bit != 0 for bit in (_IN_CHUNK, _FIRST, _LAST))
        return ChunkRows(inside, first, last, np.where(inside, values, 0.0).astype(np.float32))


def rows_of(places: np.ndarray, log_probs: np.ndarray) -> ChunkRows:
    """Rows of the labels of a text.

    Args:
        places: ``[t]``, of each label the place of its chunk's first one, -1 for none; a chunk's
            labels follow each other.
        log_probs: ``[t]`` of its chunk; anything for none.
    """
    inside = places >= 0
    first = inside & (places == np.arange(len(places)))
    last = inside & (np.append(places[1:], -1) != places)
    return ChunkRows(inside, first, last, np.where(inside, log_probs, 0.0).astype(np.float32))


def chunks_of(rows: ChunkRows, counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The chunks that samples hold whole, all of whose labels count.

    Args:
        rows: of k samples, ``[k, s]`` each.
        counted: ``[k, s]`` bool, labels whose loss counts.

    Returns:
        ``[k, s]`` int32 places of their chunks' first labels in the sample, -1 for none, and
        ``[k, s]`` float32 log-probabilities of the chunks.
    """
    length = counted.shape[1]
    at = np.arange(length)
    first = np.maximum.accumulate(np.where(rows.first, at, -1), axis=1)
    behind = np.minimum.accumulate(np.where(rows.last, at, length)[:, ::-1], axis=1)[:, ::-1]
    # A label that is in a chunk lies between the chunk's ends, but where the sample cuts it.
    ends = (first >= 0) & (behind < length) & rows.inside
    gaps = np.cumsum(~(rows.inside & counted), axis=1)
    samples = np.arange(len(counted))[:, None]
    unbroken = (
        gaps[samples, behind.clip(max=length - 1)] == gaps[samples, first.clip(min=0)]
    ) & counted[samples, first.clip(min=0)]
    whole = ends & unbroken
    return (
        np.where(whole, first, -1).astype(np.int32),
        np.where(whole, rows.log_probs, 0.0).astype(np.float32),
    )
