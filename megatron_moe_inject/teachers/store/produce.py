"""Runs a teacher over documents and keeps what it says: the rows of one shard.

A teacher reads each document by itself, whatever Megatron will cut and join in training. One that
is longer than the context goes through in windows, each of which begins with some tokens that the
one before has read, so that no token is predicted from nothing.

Windows of about the same length go through the teacher together. Which they are follows from the
documents of the shard alone, so that a shard has the same bytes whoever writes it on such a
machine.

Shapes: w windows, r rows of one pass, m their length, t tokens of a chunk, h_t teacher hidden, v
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from megatron_moe_inject.losses.products import head_logits
from megatron_moe_inject.losses.spec import LogitTransform
from megatron_moe_inject.teachers.base import Teacher
from megatron_moe_inject.teachers.fp8 import LENGTH_MULTIPLE
from megatron_moe_inject.teachers.store.manifest import StorePlan
from megatron_moe_inject.teachers.store.row_format import Rows, top_rows
from megatron_moe_inject.teachers.store.writer import Content

_LOGIT_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
"""Of the float32 logits of a chunk."""


class Window(NamedTuple):
    """What the teacher reads at once of a document.

    Attributes:
        begin, end: its tokens, among all of the shard's.
        first: of them, the first whose successor it is asked about.
        row: of that token, among the shard's rows.
    """

    begin: int
    end: int
    first: int
    row: int

    @property
    def length(self) -> int:
        """Tokens."""
        return self.end - self.begin


def windows(lengths: Sequence[int], context: int, overlap: int) -> Iterator[Window]:
    """The windows of some documents; of each document of L tokens all but the last are asked about.

    Args:
        lengths: of the documents.
        context: tokens of a window at most.
        overlap: of these, how many the window before has read; below ``context``.
    """
    start = row = 0
    for length in lengths:
        stop, first = start + length - 1, start
        while first < stop:
            begin = max(start, first - overlap)
            end = min(stop, begin + context)
            yield Window(begin, end, first, row)
            row, first = row + end - first, end
        start += length


def passes(found: Sequence[Window], pass_tokens: int) -> Iterator[list[Window]]:
    """Windows that go through the teacher together: of falling length, none filled up to more than
    twice its own, and so many tokens at most (but at least one window)."""
    own: list[Window] = []
    for window in sorted(found, key=lambda window: (-window.length, window.begin)):
        longest = own[0].length if own else window.length
        if own and (longest * (len(own) + 1) > pass_tokens or 2 * window.length < longest):
            yield own
            own = []
        own.append(window)
    if own:
        yield own


class Producer:
    """Says what a teacher thinks of documents.

    Args:
        teacher: a loaded teacher.
        plan: what is kept.
        transform: what makes its logits, with the columns that take no part.
        device: where it is.
        pass_tokens: of one forward pass.
    """

    def __init__(
        self,
        teacher: Teacher,
        plan: StorePlan,
        transform: LogitTransform,
        device: torch.device,
        pass_tokens: int,
    ) -> None:
        self._teacher = teacher
        self._plan = plan
        self._layout = plan.row_format
        self._transform = transform
        self._device = device
        self._pass_tokens = pass_tokens
        self._head = teacher.head_weight(0, plan.vocab_size)
        budget = _LOGIT_BYTES.get(device.type, _LOGIT_BYTES["cuda"])
        self._chunk = max(1, budget // (4 * plan.vocab_size))

    def rows(self, tokens: np.ndarray, lengths: Sequence[int]) -> Content:
        """Rows of some documents, in order.

        Args:
            tokens: of all of them, one after the other.
            lengths: of each.

        Raises:
            ValueError: an id that the teacher lacks, or log-probabilities that are not finite.
        """
        count = sum(max(0, length - 1) for length in lengths)
        content = np.zeros((count, self._layout.widest), np.uint8)
        counts = np.zeros(count, np.int64)
        for rows, log_probs, read in self.log_probs(tokens, lengths):
            packed, ids = self._layout.encode(self._top(log_probs, read))
            content[rows], counts[rows] = packed.cpu().numpy(), ids.cpu().numpy()
        return content, counts

    def log_probs(
        self, tokens: np.ndarray, lengths: Sequence[int]
    ) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
        """The same whole: chunk by chunk the rows [t], log-probabilities [t, v] at temperature 1 in
        float32, and the ids [t] that were read."""
        found = list(windows(lengths, self._plan.context, self._plan.overlap))
        for own in passes(found, self._pass_tokens):
            yield from self._pass(tokens, own)

    def _pass(
        self, tokens: np.ndarray, own: Sequence[Window]
    ) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
        longest = -(-own[0].length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        text = np.zeros((len(own), longest), np.int64)
        for row, window in enumerate(own):
            text[row, : window.length] = tokens[window.begin : window.end]
        read = torch.from_numpy(text).to(self._device)
        states = self._teacher.hidden_states(read).flatten(0, 1)
        spans = [(n * longest, window) for n, window in enumerate(own)]
        places = np.concatenate(
            [np.arange(at + w.first - w.begin, at + w.length) for at, w in spans]
        )
        rows = np.concatenate([np.arange(w.row, w.row + w.end - w.first) for w in own])
        for begin in range(0, len(places), self._chunk):
            part = slice(begin, begin + self._chunk)
            at = torch.from_numpy(places[part]).to(self._device)
            logits = head_logits(states[at], self._head)
            logits = self._transform.apply_(logits) if self._transform else logits
            yield rows[part], logits.float().log_softmax(-1), read.flatten()[at]

    def _top(self, log_probs: torch.Tensor, tokens: torch.Tensor) -> Rows:
        plan = self._plan
        return top_rows(
            tokens,
            log_probs,
            slots=plan.slots,
            mass=plan.mass,
            temperatures=plan.temperatures,
        )
