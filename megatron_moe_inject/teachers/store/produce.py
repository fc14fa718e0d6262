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
from megatron_moe_inject.teachers.store.chunk_format import ChunkFormat
from megatron_moe_inject.teachers.store.drawn import drawn_rows, uniforms
from megatron_moe_inject.teachers.store.manifest import StorePlan
from megatron_moe_inject.teachers.store.row_format import top_rows
from megatron_moe_inject.teachers.store.state_format import StateFormat
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


class Said(NamedTuple):
    """What a teacher says of t tokens.

    Attributes:
        rows: [t] among the shard's.
        places: [t] among its tokens.
        states: [t, h_t], which its head reads.
        tokens: [t] that were read.
        next_tokens: [t] that follow.
    """

    rows: np.ndarray
    places: np.ndarray
    states: torch.Tensor
    tokens: torch.Tensor
    next_tokens: torch.Tensor


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
        layout = plan.row_format
        assert not isinstance(layout, ChunkFormat), "which has another producer"
        self._layout = layout
        self._transform = transform
        self._device = device
        self._pass_tokens = pass_tokens
        self._head = teacher.head_weight(0, plan.vocab_size)
        budget = _LOGIT_BYTES.get(device.type, _LOGIT_BYTES["cuda"])
        self._chunk = max(1, budget // (4 * plan.vocab_size))

    @property
    def head(self) -> tuple[torch.Tensor, LogitTransform]:
        """What makes logits of states: ``[v, h_t]``, and what becomes of the product."""
        return self._head, self._transform

    def rows(
        self, tokens: np.ndarray, lengths: Sequence[int], *, data: int = 0, first_token: int = 0
    ) -> Content:
        """Rows of some documents, in order.

        Args:
            tokens: of all of them, one after the other.
            lengths: of each.
            data: position of the data set; what is drawn follows from it
            first_token: and from the place of the first token in it.

        Raises:
            ValueError: an id that the teacher lacks, or numbers that are not finite.
        """
        count = sum(max(0, length - 1) for length in lengths)
        content = np.zeros((count, self._layout.widest), np.uint8)
        counts = np.zeros(count, np.int64)
        for said in self.states(tokens, lengths):
            packed, ids = self._packed(said, data, first_token)
            content[said.rows], counts[said.rows] = packed.cpu().numpy(), ids
        return content, counts

    def _packed(
        self, said: Said, data: int, first_token: int
    ) -> tuple[torch.Tensor, np.ndarray | int]:
        if isinstance(self._layout, StateFormat):
            return self._layout.encode(said.tokens, said.states), 1
        plan = self._plan
        log_probs, labels = self.log_probs(said.states), said.next_tokens if plan.labels else None
        if plan.drawn:
            random = uniforms(data, first_token + said.places, plan.slots)
            rows = drawn_rows(
                said.tokens,
                log_probs,
                temperature=plan.temperatures[0],
                random=torch.from_numpy(random).to(log_probs.device),
                labels=labels,
            )
        else:
            rows = top_rows(
                said.tokens,
                log_probs,
                slots=plan.slots,
                mass=plan.mass,
                temperatures=plan.temperatures,
                labels=labels,
            )
        content, counts = self._layout.encode(rows)
        return content, counts.cpu().numpy()

    def log_probs(self, states: torch.Tensor) -> torch.Tensor:
        """Of states [t, h_t], [t, v] at temperature 1 in float32."""
        logits = head_logits(states, self._head)
        logits = self._transform.apply_(logits) if self._transform else logits
        return logits.float().log_softmax(-1)

    def states(self, tokens: np.ndarray, lengths: Sequence[int]) -> Iterator[Said]:
        """What the head reads of some documents, as many tokens at a time as logits may be made of
        at once; arguments as of ``rows``."""
        found = list(windows(lengths, self._plan.context, self._plan.overlap))
        for own in passes(found, self._pass_tokens):
            yield from self._pass(tokens, own)

    def _pass(self, tokens: np.ndarray, own: Sequence[Window]) -> Iterator[Said]:
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
        asked = np.concatenate([np.arange(w.first, w.end) for w in own])
        for begin in range(0, len(places), self._chunk):
            part = slice(begin, begin + self._chunk)
            at = torch.from_numpy(places[part]).to(self._device)
            following = torch.from_numpy(tokens[asked[part] + 1]).to(self._device)
            yield Said(rows[part], asked[part], states[at], read.flatten()[at], following)
