"""Which texts a step asks servers about: samples, or the documents in them.

A sample is asked about with its last label behind it, so that there is a row for each of its
positions and the label's probability in each. Where samples are packed, each document is a text of
its own, as a model reads it, with the label at its end behind it. Positions at the end of a text
whose labels are none (negative) are not asked about, such as what fills up an answer of a pair.

Shapes: k samples, s sequence, t ids of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Text(NamedTuple):
    """A text, and where its answer belongs.

    Attributes:
        tokens: [t] int32.
        sample: among the k.
        begin: position of its first token.
    """

    tokens: np.ndarray
    sample: int
    begin: int

    @property
    def rows(self) -> slice:
        """The positions that its answer is about."""
        return slice(self.begin, self.begin + len(self.tokens) - 1)


def texts_of(
    tokens: np.ndarray, labels: np.ndarray, lengths: Sequence[Sequence[int]] | None = None
) -> list[Text]:
    """The texts of some samples.

    Args:
        tokens, labels: [k, s].
        lengths: of the documents of each sample; None where it is read as a whole.
    """
    texts = []
    for sample, (own, own_labels) in enumerate(zip(tokens, labels, strict=True)):
        begin = 0
        for length in [len(own)] if lengths is None else lengths[sample]:
            end = begin + length
            labelled = np.flatnonzero(own_labels[begin:end] >= 0)
            if len(labelled):
                last = begin + labelled[-1]
                ids = np.append(own[begin : last + 1], own_labels[last])
                texts.append(Text(ids.astype(np.int32), sample, begin))
            begin = end
    return texts
