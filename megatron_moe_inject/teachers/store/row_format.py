"""What a store keeps of one token, as few bits as it needs, and back again.

A row is what the teacher says about the token that follows:

    token | label | log_rest of each temperature | span | low bits of the ids | codes | high bits

- ``token``: the id that the teacher read at this place, so that a reader sees that its text is the
  teacher's.
- ``label``: the log-probability of the token that follows in the text, at temperature 1, whether or
  not it is among the ids: what weighs tokens, tells how good the teacher is, and costs two bytes at
  most. Its id is the text's.
- ``log_rest``: log of the probability that all ids which are not stored have together, at each
  temperature. With it the stored probabilities are normalised again on reading, so that no rounding
  of them moves mass between them and the rest. It is the log-sum-exp of the temperature in another
  form: lse(z / T) = log sum over stored of exp(z / T) - log(1 - rest).
- ids, ascending, by Elias and Fano (1974): the low bits of each as they are, and of the high bits
  the gaps in unary. n ids below v take n (2 + log2(v / n)) bits, where v is much more than n about
  half a bit an id more than a set of n ids takes at least; each by itself would take log2(v).
- ``codes``: log-probabilities in the order of the ids. ``fp32`` and ``bf16`` as they are.
  ``packed``: six bits for how far each lies below the largest, in steps that grow from 0.4 % of the
  span of the row at its top to 4 % at its bottom, where a probability is next to nothing.

``drawn`` rows hold ids that were drawn from the teacher at one temperature, k draws a row: the
codes are how often each was drawn, and there is no rest.

A row is filled up to whole bytes. Rows of fewer ids are shorter, see ``RowFormat.row_bytes``.

Shapes: t rows, n ids of a row, k at most, m temperatures.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PRECISIONS = ("packed", "bf16", "fp32")
DRAWN = "drawn"
"""In the place of a precision, of rows whose ids were drawn."""
_CODE_BITS = {"packed": 6, "bf16": 16, "fp32": 32}
_REST_BITS = {"packed": 16, "bf16": 32, "fp32": 32, DRAWN: 0}
_LABEL_BITS = {"packed": 12, "bf16": 16, "fp32": 32, DRAWN: 12}
_UNLIKELIEST = 64.0
"""Nats that twelve bits of a label's log-probability reach."""
_LAST = (1 << 6) - 1
_SPANS = 8
"""Parts of a nat in which a span is kept, in one byte."""
_GROWTH = 2.5
"""How steps grow: the last is exp(2.5) times the first."""
_MOST_IDS = (1 << 16) - 1


class Rows(NamedTuple):
    """What is stored of t tokens.

    Attributes:
        tokens: [t] ids that were read.
        ids: [t, k] int64, ascending; -1 behind the last where there are fewer.
        log_probs: [t, k] float32 at temperature 1, -inf behind the last; of drawn ids the log of
            the share of draws that each is.
        log_rest: [t, m] float32, of all other ids together at each temperature; [t, 0] of drawn
            ids.
        label: [t] float32, log-probability of the next token of the text; None where not kept.
    """

    tokens: Tensor
    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor
    label: Tensor | None = None

    def some(self, rows: Tensor | slice | np.ndarray) -> Rows:
        """Of these rows."""
        return self.changed(lambda part: part[rows])

    def changed(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """With every tensor changed."""
        label = None if self.label is None else change(self.label)
        return Rows(
            change(self.tokens),
            change(self.ids),
            change(self.log_probs),
            change(self.log_rest),
            label,
        )

    def at(self, index: int, temperature: float) -> Tensor:
        """Log-probabilities [t, k] over the whole vocabulary at a temperature, float32; of drawn
        ids their log weights.

        Args:
            index: of the temperature, as in ``log_rest``.
        """
        if not self.log_rest.shape[1]:
            return self.log_probs
        log_probs = self.log_probs / temperature
        mass = _log_one_minus_exp(self.log_rest[:, index])
        total = log_probs.logsumexp(-1).masked_fill(self.ids[:, 0] < 0, 0.0)
        return log_probs + (mass - total)[:, None]


@dataclass(frozen=True)
class RowFormat:
    """How rows are laid out.

    Attributes:
        vocab_size: v; all ids are below.
        slots: k, ids of a row at most, or how many are drawn.
        precision: of log-probabilities, one of ``PRECISIONS``, or ``DRAWN``.
        temperatures: how many ``log_rest`` there are, m; none of drawn ids.
        labels: whether the label's log-probability is kept.
    """

    vocab_size: int
    slots: int
    precision: str
    temperatures: int = 1
    labels: bool = True

    def __post_init__(self) -> None:
        most = _MOST_IDS if self.precision == DRAWN else min(self.vocab_size, _MOST_IDS)
        if not 1 <= self.slots <= most:
            raise ValueError(
                f"{self.slots} ids of a vocabulary of {self.vocab_size}; keep 1 to {most}"
            )
        if self.precision not in (*PRECISIONS, DRAWN):
            raise ValueError(f"precision={self.precision!r}; use one of {', '.join(PRECISIONS)}")
        if self.temperatures < 1:
            raise ValueError(f"{self.temperatures} temperatures; keep at least one")

    @property
    def _token_bits(self) -> int:
        return max(1, (self.vocab_size - 1).bit_length())

    @property
    def _label_bits(self) -> int:
        return _LABEL_BITS[self.precision] if self.labels else 0

    @property
    def _rest_bits(self) -> int:
        return _REST_BITS[self.precision]

    @property
    def _rests(self) -> int:
        """Numbers of ``log_rest`` in a row."""
        return 0 if self.precision == DRAWN else self.temperatures

    @property
    def _span_bits(self) -> int:
        return 8 if self.precision == "packed" else 0

    @property
    def _code_bits(self) -> int:
        return self.slots.bit_length() if self.precision == DRAWN else _CODE_BITS[self.precision]

    @property
    def _front(self) -> int:
        """Bits before the ids."""
        rests = self._rests * self._rest_bits
        return self._token_bits + self._label_bits + rests + self._span_bits

    def low_bits(self, count: int) -> int:
        """Of each id in a row of ``count``."""
        return (self.vocab_size // count).bit_length() - 1 if count else 0

    def high_bits(self, count: int) -> int:
        """Of all ids of a row of ``count`` together."""
        return count + ((self.vocab_size - 1) >> self.low_bits(count)) if count else 0

    def row_bytes(self, count: int) -> int:
        """Bytes of a row of ``count`` ids."""
        bits = count * (self.low_bits(count) + self._code_bits) + self.high_bits(count)
        return -(-(self._front + bits) // 8)

    @property
    def most_ids(self) -> int:
        """Of a row: what is drawn more often than there are ids has fewer of them."""
        return min(self.slots, self.vocab_size)

    @property
    def widest(self) -> int:
        """Bytes of the longest row."""
        return max(self._bytes_by_count)

    @functools.cached_property
    def _bytes_by_count(self) -> tuple[int, ...]:
        return tuple(self.row_bytes(count) for count in range(self.most_ids + 1))

    def bytes_of(self, counts: np.ndarray) -> np.ndarray:
        """``row_bytes`` of each of [t] counts."""
        return np.array(self._bytes_by_count)[counts]

    def encode(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Bytes [t, ``widest``] of all rows, zeros behind each, and their numbers of ids, [t].

        Raises:
            ValueError: ids that are not ascending and below ``vocab_size``, or a number that is
                none. (Reads the device.)
        """
        counts = (rows.ids >= 0).sum(-1)
        self._check(rows, counts)
        content = torch.zeros(len(counts), self.widest, dtype=torch.uint8, device=rows.ids.device)
        for count in counts.unique().tolist():
            members = (counts == count).nonzero().flatten()
            packed = self._encode(rows.some(members), count)
            content[members, : packed.shape[1]] = packed
        return content, counts

    def _check(self, rows: Rows, counts: Tensor) -> None:
        used = rows.ids >= 0
        slot = torch.arange(rows.ids.shape[-1], device=used.device)
        dense = used == (slot < counts[:, None])
        ascending = (rows.ids[:, 1:] > rows.ids[:, :-1]) | ~used[:, 1:]
        below = (rows.ids < self.vocab_size).all() & (rows.tokens < self.vocab_size).all()
        if not (dense.all() and ascending.all() and below and (rows.tokens >= 0).all()):
            raise ValueError(f"ids must ascend, below {self.vocab_size}, unused ones behind")
        finite = rows.log_probs.isfinite() | ~used
        if not finite.all() or rows.log_rest.isnan().any() or (rows.log_rest > 0).any():
            raise ValueError("a teacher's log-probabilities are not finite")
        if self.labels and (rows.label is None or rows.label.isnan().any()):
            raise ValueError("a teacher's log-probabilities are not finite")
        if len(counts) and not 1 <= int(counts.min()) <= int(counts.max()) <= self.most_ids:
            raise ValueError(f"a row must hold 1 to {self.most_ids} ids")

    def _encode(self, rows: Rows, count: int) -> Tensor:
        """Bytes [t, row_bytes(count)] of rows that have ``count`` ids each."""
        ids, log_probs = rows.ids[:, :count], rows.log_probs[:, :count].float()
        low = self.low_bits(count)
        parts = [_bits(rows.tokens[:, None], self._token_bits)]
        if self.labels:
            assert rows.label is not None, "checked"
            parts.append(_bits(self._label_codes(rows.label[:, None]), self._label_bits))
        if self.precision == DRAWN:
            times = (log_probs.exp() * self.slots).round().long()
            parts.append(_bits(ids & ((1 << low) - 1), low))
            parts.append(_bits(times, self._code_bits))
        elif self.precision == "packed":
            parts.append(_bits(_as_ints(rows.log_rest.to(torch.bfloat16)), 16))
            largest = log_probs.amax(-1, keepdim=True)
            gap = largest - log_probs
            span = (gap.amax(-1, keepdim=True) * _SPANS).ceil().clamp(1, 255)
            parts.append(_bits(span.long(), 8))
            codes = (gap * _SPANS / span).clamp(max=1) * math.expm1(_GROWTH)
            parts.append(_bits(ids & ((1 << low) - 1), low))
            parts.append(_bits((codes.log1p() * (_LAST / _GROWTH)).round().long(), 6))
        else:
            parts.append(_bits(_as_ints(rows.log_rest.float()), 32))
            parts.append(_bits(ids & ((1 << low) - 1), low))
            parts.append(_bits(_as_ints(log_probs.to(self._float)), self._code_bits))
        high = ids.new_zeros(len(ids), self.high_bits(count), dtype=torch.uint8)
        places = (ids >> low) + torch.arange(count, device=ids.device)
        parts.append(high.scatter_(1, places, 1))
        bits = torch.cat(parts, 1)
        whole = bits.new_zeros(len(bits), 8 * self.row_bytes(count))
        whole[:, : bits.shape[1]] = bits
        powers = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=bits.device)
        return (whole.view(len(bits), -1, 8) * powers).sum(-1, dtype=torch.uint8)

    @property
    def _float(self) -> torch.dtype:
        """Of log-probabilities that are kept as they are."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def _label_codes(self, label: Tensor) -> Tensor:
        """Bits of the label's log-probabilities [t, 1]."""
        if self.precision in ("bf16", "fp32"):
            return _as_ints(label.to(self._float))
        last = (1 << self._label_bits) - 1
        codes = label.neg().clamp(0, _UNLIKELIEST).log1p() * (last / math.log1p(_UNLIKELIEST))
        return codes.round().long()

    def _label_of(self, codes: Tensor) -> Tensor:
        """Of ``_label_codes``, up to rounding: in twelve bits half a thousandth of 1 + nats."""
        if self.precision in ("bf16", "fp32"):
            return _as_floats(codes, self._float)
        last = (1 << self._label_bits) - 1
        return torch.expm1(codes.float() * (math.log1p(_UNLIKELIEST) / last)).neg()

    def tokens(self, content: Tensor) -> Tensor:
        """The tokens [t] that were read, of bytes [t, w]; see ``Rows``."""
        content = torch.nn.functional.pad(content[:, :5], (0, 5)).long()
        return _read(content, content.new_zeros(len(content), 1), self._token_bits).squeeze(1)

    def decode(self, content: Tensor, counts: Tensor | None = None) -> Rows:
        """Of bytes [t, ``widest``], filled up behind each row with anything, what was encoded.

        Args:
            counts: [t] ids of each row, 0 for a row that is not there; None where all have k.

        No host synchronisation. A row that is not there has no id, no rest, and the token -1.
        """
        device, rows = content.device, len(content)
        if counts is None:
            counts = torch.full((rows,), self.most_ids, device=device)
        counts = counts.long()[:, None]
        low = _by_count(self, device)[0][counts]
        # So many bytes are read at once; the last ones of a row may have fewer behind them.
        content = torch.nn.functional.pad(content, (0, 5)).long()
        tokens = _read(content, torch.zeros_like(counts), self._token_bits)
        label = None
        if self.labels:
            places = torch.full_like(counts, self._token_bits)
            label = self._label_of(_read(content, places, self._label_bits)).squeeze(1)
        at = self._token_bits + self._label_bits
        rest_places = at + self._rest_bits * torch.arange(self._rests, device=device)
        rest = _read(content, rest_places.expand(rows, -1), self._rest_bits)
        slot = torch.arange(self.most_ids, device=device)
        used = slot < counts
        codes_at = self._front + low * counts
        codes = _read(content, codes_at + self._code_bits * slot, self._code_bits)
        lows = _read(content, self._front + low * slot, low)
        ids = (self._highs(content, codes_at + self._code_bits * counts, counts) << low) | lows
        if self.precision == DRAWN:
            log_rest = rest.float()
            log_probs = (codes.float() / self.slots).log()
        elif self.precision == "packed":
            log_rest = _as_floats(rest, torch.bfloat16)
            span = _read(content, counts * 0 + self._front - 8, 8).float() / _SPANS
            steps = torch.expm1(codes.float() * (_GROWTH / _LAST)) / math.expm1(_GROWTH)
            log_probs = -span * steps
        else:
            log_rest = _as_floats(rest, torch.float32)
            log_probs = _as_floats(codes, self._float)
        there = counts > 0
        return Rows(
            tokens.masked_fill(~there, -1).squeeze(1),
            ids.masked_fill(~used, -1),
            log_probs.masked_fill(~used, -torch.inf),
            log_rest.masked_fill(~there, -torch.inf),
            None if label is None else label.masked_fill(~there.squeeze(1), -torch.inf),
        )

    def _highs(self, content: Tensor, begin: Tensor, counts: Tensor) -> Tensor:
        """High bits [t, k] of the ids, whose unary code begins at ``begin`` [t, 1]."""
        lengths = _by_count(self, content.device)[1]
        longest = max(self.high_bits(count) for count in range(self.most_ids + 1))
        place = torch.arange(longest, device=content.device)
        bits = _read(content, begin + place, 1) * (place < lengths[counts])
        # Of the j-th set bit, its place less j; others go to a column behind.
        behind = self.most_ids
        order = torch.where(bits.bool(), bits.cumsum(1) - 1, behind).clamp_(max=behind)
        highs = content.new_zeros(len(content), self.most_ids + 1)
        highs.scatter_(1, order, place.expand_as(order))
        return highs[:, :-1] - torch.arange(self.most_ids, device=content.device)


@functools.lru_cache(maxsize=16)
def _by_count(layout: RowFormat, device: torch.device) -> tuple[Tensor, Tensor]:
    """``low_bits`` and ``high_bits`` by number of ids, int64 [k + 1] each; copied to a device once,
    since such a copy waits for it."""
    counts = range(layout.most_ids + 1)
    return (
        torch.tensor([layout.low_bits(count) for count in counts], device=device),
        torch.tensor([layout.high_bits(count) for count in counts], device=device),
    )


def top_rows(
    tokens: Tensor,
    log_probs: Tensor,
    *,
    slots: int,
    mass: float | None,
    temperatures: Sequence[float],
    labels: Tensor | None = None,
) -> Rows:
    """The k most likely ids of each token, ascending.

    Args:
        tokens: [t] ids that were read.
        log_probs: [t, v] float32 at temperature 1.
        slots: k.
        mass: of each token only as many as have this probability together; None for all k.
        temperatures: of ``log_rest``.
        labels: [t] ids that follow; None where their log-probabilities are not kept.
    """
    top, ids = log_probs.topk(slots, -1)
    kept = top > -torch.inf
    if mass is not None:
        before = top.exp().cumsum(-1) - top.exp()
        kept = kept & (before < mass)
        kept[:, 0] = True
    stored = top.masked_fill(~kept, -torch.inf)
    outside = log_probs.clone().scatter_(1, ids, top.masked_fill(kept, -torch.inf))
    rests = []
    for temperature in temperatures:
        total = (log_probs / temperature).logsumexp(-1)
        rest = (outside / temperature).logsumexp(-1) - total
        inside = (stored / temperature).logsumexp(-1) - total
        # Whichever of the two is small is known well; the other follows from it.
        rests.append(torch.where(rest < inside, rest, _log_one_minus_exp(inside.clamp(max=0))))
    ordered, order = ids.masked_fill(~kept, torch.iinfo(torch.int64).max).sort(-1)
    unused = ~kept.gather(1, order)
    return Rows(
        tokens,
        ordered.masked_fill(unused, -1),
        top.gather(1, order).masked_fill(unused, -torch.inf),
        torch.stack(rests, -1).clamp_(max=0),
        None if labels is None else log_probs.gather(1, labels[:, None]).squeeze(1),
    )


def listed_rows(
    tokens: Tensor, ids: Tensor, log_probs: Tensor, slots: int, vocab_size: int
) -> Rows:
    """Ids that another program has listed, in any order, at temperature 1; without labels.

    Args:
        tokens: [t] ids that were read.
        ids: [t, n].
        log_probs: [t, n]; -inf or no number where a place is not used.
        slots: k; of more than so many the most likely.
        vocab_size: v; of ids beyond, which are padding, nothing is kept.
    """
    unused = ~log_probs.isfinite() | (ids >= vocab_size)
    log_probs = log_probs.float().masked_fill(unused, -torch.inf)
    top, places = log_probs.topk(min(slots, ids.shape[1]), -1)
    unused = top == -torch.inf
    none = torch.iinfo(torch.int64).max
    ordered, order = ids.gather(1, places).masked_fill(unused, none).sort(-1)
    unused = ordered == none
    kept = top.gather(1, order).masked_fill(unused, -torch.inf)
    # What rounding leaves above 1 is scaled to 1 on reading.
    rest = _log_one_minus_exp(kept.logsumexp(-1).clamp(max=0))
    return Rows(tokens, ordered.masked_fill(unused, -1), kept, rest[:, None])


def _log_one_minus_exp(log_mass: Tensor) -> Tensor:
    """log(1 - exp(log_mass)) of numbers up to 0, exact near both ends."""
    near_one = (-log_mass.expm1()).log()
    return torch.where(log_mass < -math.log(2), (-log_mass.exp()).log1p(), near_one)


def _as_ints(values: Tensor) -> Tensor:
    """The bits of floats as non-negative int64."""
    size = values.dtype.itemsize
    ints = values.contiguous().view(torch.int16 if size == 2 else torch.int32)
    return ints.long() & ((1 << (8 * size)) - 1)


def _as_floats(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Floats, as float32, of which ``_as_ints`` gave the bits."""
    size = dtype.itemsize
    signed = torch.where(bits >= 1 << (8 * size - 1), bits - (1 << (8 * size)), bits)
    return signed.to(torch.int16 if size == 2 else torch.int32).view(dtype).float()


def _bits(values: Tensor, width: int) -> Tensor:
    """The ``width`` lowest bits of each of [t, n], lowest first: uint8 [t, n * width]."""
    places = torch.arange(width, device=values.device)
    return ((values[..., None] >> places) & 1).to(torch.uint8).flatten(1)


def _read(content: Tensor, places: Tensor, width: int | Tensor) -> Tensor:
    """Numbers of ``width`` bits, at most 32, that begin at bits ``places`` [t, n] of bytes [t, w].

    What lies behind the last bytes reads as anything.
    """
    first = (places >> 3).clamp_(max=content.shape[1] - 5)
    number = torch.zeros_like(places)
    reach = 5 if isinstance(width, Tensor) else (width + 14) // 8
    for offset in range(reach):
        number |= content.gather(1, first + offset) << (8 * offset)
    one = torch.ones_like(places)
    return (number >> (places & 7)) & ((one << width) - 1)
