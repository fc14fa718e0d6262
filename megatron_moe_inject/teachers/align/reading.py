"""What a teacher with another tokenizer reads of a step's samples, and which chunks it tells of.

The text of a sample is the bytes of its ids. It is cut at special tokens; what lies between is
tokenised by the teacher's tokenizer, and the special tokens become the teacher's of the same name,
or of the same role (end of document, beginning). So the teacher reads what the student reads, as
its own ids. Where documents are apart (packed, or masked from each other) each is a text of its
own; else a window is one text, as it is for the student.

What is not told of:

- the first token of a text, which the student predicts from nothing; without a prefix in front,
  the teacher's first likewise;
- where a window ends inside a document: the teacher's last token, and those before it back to the
  last one that begins with white space, at most four and none before a special token: had the text
  gone on, it might have been cut in another way;
- half letters: UTF-8 bytes at a window's border whose others are outside;
- chunks of which a label is masked;
- all from a special token on that the teacher has not, from bytes on that are no UTF-8, and from a
  place on that its tokenizer does not give back as it was.

Nothing here needs torch. Shapes: k samples, s sequence length, r texts, t tokens of all texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from megatron_moe_inject.teachers.align.alignment import align
from megatron_moe_inject.teachers.align.byte_tokenizer import ByteTokenizer

_CUT_SHORT = 4
"""Tokens at the end of a text that goes on, at most, that might have been others."""
_WHITE = tuple(b" \t\n\r\x0b\x0c")


@dataclass(frozen=True)
class Reading:
    """What is to be read, and where what is said of it belongs.

    Attributes:
        lengths: ``[r]``, tokens of each text that are read.
        inputs: ``[t]`` int32, ids, one text behind the other.
        labels: ``[t]`` int32, the id behind each of them.
        numbers: ``[t]`` int64, the chunk that each of ``labels`` belongs to: its sample times s and
            the place of its first label among the sample's; k s for none.
        places: ``[k, s]`` int32, at each of the student's labels the place of its chunk's first
            one; -1 for none.
    """

    lengths: np.ndarray
    inputs: np.ndarray
    labels: np.ndarray
    numbers: np.ndarray
    places: np.ndarray


def nothing_read(length: int) -> Reading:
    """Of no sample of so many tokens."""
    return _reading([], np.zeros((0, length), np.int32))


class Span(NamedTuple):
    """What is read at once of a text of t ids.

    Attributes:
        begin, end: ids ``begin`` to ``end`` - 1 are read.
        first: of them, the first whose successor is asked about.
    """

    begin: int
    end: int
    first: int


Spans = Callable[[int], Iterable[Span]]
"""Cuts a text of so many ids into what is read at once."""


class _Row(NamedTuple):
    """A text as the teacher has it: what stands in front, its ids, and the number of the chunk that
    each of these belongs to, as in ``Reading``."""

    front: np.ndarray
    ids: np.ndarray
    told: np.ndarray


@dataclass
class _Text:
    """A text: a sample, or a document of one."""

    sample: int
    first: int
    ids: np.ndarray
    goes_on: bool
    begins: bool
    segments: list[_Segment] = field(default_factory=list)


@dataclass
class _Segment:
    """A piece of a text between special tokens, or a special token."""

    at: int  # where it begins, in bytes of the text
    text: bytes
    starts: np.ndarray  # of the student's tokens, likewise
    end: int  # behind the last of them
    special: int | None = None  # the teacher's id


class Reader:
    """Turns the student's samples into what the teacher reads.

    Args:
        student, teacher: their tokenizers.
        prefix: ids that stand in front of each text for the teacher.
        longest: tokens that it can read, the prefix included; None without limit.
    """

    def __init__(
        self,
        student: ByteTokenizer,
        teacher: ByteTokenizer,
        prefix: Sequence[int] = (),
        longest: int | None = None,
    ) -> None:
        self._student = student
        self._teacher = teacher
        self._prefix = np.array(prefix, np.int64)
        self._longest = longest
        self._same = {
            index: same
            for index in student.names
            if (same := self._same_special(index)) is not None
        }

    def _same_special(self, index: int) -> int | None:
        """The teacher's special token of a student's."""
        student, teacher = self._student, self._teacher
        named = teacher.specials.get(student.names[index])
        if named is not None:
            return named
        if index == student.end:
            return teacher.end
        return teacher.begin if index == student.begin else None

    @property
    def lacking(self) -> dict[int, str]:
        """Special tokens of the student that the teacher has not, names by id."""
        return {i: name for i, name in self._student.names.items() if i not in self._same}

    def read(
        self,
        tokens: np.ndarray,
        following: np.ndarray,
        counted: np.ndarray,
        starts: np.ndarray | None = None,
    ) -> Reading:
        """Read samples.

        Args:
            tokens: ``[k, s]`` the student's ids.
            following: ``[k]`` the label of each sample's last token; negative for none.
            counted: ``[k, s]`` bool, labels whose loss counts.
            starts: ``[k, s]`` bool, where documents begin that are read apart; None for samples
                that are one text each.
        """
        rows, places = self._rows(self._texts(tokens, following, starts), counted)
        return _reading([_whole(row, tokens.size) for row in rows], places)

    def read_documents(self, tokens: np.ndarray, lengths: Sequence[int], spans: Spans) -> Reading:
        """Read whole documents, each a text of its own, long ones a span at a time.

        Args:
            tokens: ``[n]`` the student's ids, one document behind the other.
            lengths: of the documents, n in sum.
            spans: of a text of so many of the teacher's ids, without what stands in front of each.

        Returns:
            A reading of one sample of n tokens; no label of one document is the next one's first.
        """
        ends = np.cumsum(lengths, dtype=np.int64)
        texts = [
            _Text(0, int(end - length), tokens[end - length : end], goes_on=False, begins=True)
            for length, end in zip(lengths, ends, strict=True)
            if length > 1
        ]
        rows, places = self._rows(texts, np.ones((1, len(tokens)), bool))
        read = [
            _part(row, span, self._prefix, len(tokens))
            for row in rows
            for span in spans(len(row.ids))
        ]
        return _reading([part for part in read if part is not None], places)

    def _rows(self, texts: Sequence[_Text], counted: np.ndarray) -> tuple[list[_Row], np.ndarray]:
        """What the teacher reads of texts of which it can tell something, and ``Reading.places``
        ``[k, s]``."""
        for text in texts:
            self._cut(text)
        pieces = [s.text.decode() for text in texts for s in text.segments if s.special is None]
        encoded = iter(self._encoded(pieces))
        places = np.full(counted.shape, -1, np.int32)
        rows = []
        for text in texts:
            own = [None if s.special is not None else next(encoded) for s in text.segments]
            row = self._row(text, own, counted[text.sample], places[text.sample], counted.size)
            if row is not None:
                rows.append(row)
        return rows, places

    def _texts(
        self, tokens: np.ndarray, following: np.ndarray, starts: np.ndarray | None
    ) -> list[_Text]:
        texts, end = [], self._student.end
        for sample, ids in enumerate(tokens):
            borders = [0, len(ids)]
            if starts is not None:
                borders = [*np.flatnonzero(starts[sample]).tolist(), len(ids)]
            for first, stop in itertools.pairwise(borders):
                own, last = ids[first:stop], stop == len(ids)
                # What follows the end of a document that is read apart belongs to another.
                apart = starts is not None and own[-1] == end
                if last and not apart and following[sample] >= 0:
                    own = np.append(own, following[sample])
                goes_on = last and own[-1] != end
                texts.append(_Text(sample, first, own, goes_on, starts is not None))
        return texts

    def _cut(self, text: _Text) -> None:
        """Find its segments, and leave the rest of the text out where it cannot be read."""
        student, ids = self._student, text.ids
        known = (ids >= 0) & (ids < len(student.pieces))
        if not known.all():
            ids = ids[: int(np.argmin(known))]
        marks = np.flatnonzero(student.textless[ids])
        at, first, begins = 0, 0, text.begins
        for stop in (*marks.tolist(), len(ids)):
            own = ids[first:stop]
            raw = student.bytes_of(own.tolist())
            lead = _half_letter(raw) if first == 0 else 0
            in_front = begins and student.space_in_front and raw.startswith(b" ")
            lead = 1 if in_front else lead
            readable, whole = _readable(raw[lead:])
            lengths = student.lengths[own]
            starts = at - lead + np.cumsum(lengths) - lengths
            if in_front:  # none of the text's: its token begins where the text does
                starts = starts.clip(min=at)
            end = at - lead + len(raw)
            text.segments.append(_Segment(at, readable, starts, end))
            if stop == len(ids) or not whole:
                text.goes_on |= stop < len(ids)
                return
            same = self._same.get(int(ids[stop]))
            if same is None:
                text.goes_on = False
                return
            at += len(readable)
            text.segments.append(_Segment(at, b"", np.array([at]), at + 1, same))
            at, first, begins = at + 1, stop + 1, True

    def _encoded(self, pieces: list[str]) -> list[tuple[np.ndarray, np.ndarray, bool]]:
        """Of each piece the teacher's ids, the bytes at which they begin, and whether they give
        the piece back."""
        texts = [piece.encode() for piece in pieces]
        found = [self._placed(*pair) for pair in zip(texts, self._ids(pieces), strict=True)]
        # A space that the text has need not be put in front a second time.
        twice = [
            i for i, text in enumerate(texts)
            if text.startswith(b" ") and found[i][2] and found[i][1][0] < 0
        ]  # fmt: skip
        for i, ids in zip(twice, self._ids([pieces[i][1:] for i in twice]), strict=True):
            once = self._placed(texts[i], ids)
            if once[2] and once[1][0] == 0:
                found[i] = once
        return [(ids, starts.clip(min=0), whole) for ids, starts, whole in found]

    def _ids(self, pieces: list[str]) -> list[np.ndarray]:
        return [np.asarray(ids, np.int64) for ids in self._teacher.encode(pieces)]

    def _placed(self, text: bytes, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """``_encoded`` of one piece; a space in front that is none of the text's begins at -1."""
        lengths = self._teacher.lengths[ids]
        back = self._teacher.bytes_of(ids.tolist())
        front = 1 if back == b" " + text else 0
        starts = np.cumsum(lengths) - lengths - front
        if back[front:] == text:
            return ids, starts, True
        pairs = zip(text, back, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(back)))
        usable = starts + lengths <= same
        return ids[usable], starts[usable], False

    def _row(
        self,
        text: _Text,
        encoded: Sequence[tuple[np.ndarray, np.ndarray, bool] | None],
        counted: np.ndarray,
        places: np.ndarray,
        nowhere: int,
    ) -> _Row | None:
        """What the teacher reads of a text, None where nothing can be told of it; fills ``places``
        ``[s]``."""
        ids, starts, student = [], [], []
        ends, goes_on, sure = (0, 0), text.goes_on, 0
        for segment, own in zip(text.segments, encoded, strict=True):
            student.append(segment.starts)
            if own is None:
                ids.append(np.array([segment.special], np.int64))
                starts.append(segment.starts)
                ends = segment.end, segment.end
                sure = sum(map(len, ids))
                continue
            ids.append(own[0])
            starts.append(segment.at + own[1])
            behind = len(segment.text)
            if not own[2]:
                behind = int(self._teacher.lengths[own[0]].sum())
            ends = segment.end, segment.at + behind
            if not own[2]:
                goes_on = True
                break
        of_teacher, begins = np.concatenate(ids), np.concatenate(starts)
        prefix = self._prefix
        if len(prefix) and len(of_teacher) and of_teacher[0] == prefix[-1]:
            prefix = prefix[:0]  # the text has it itself
        if self._longest is not None and len(prefix) + len(of_teacher) > self._longest + 1:
            most = self._longest + 1 - len(prefix)
            ends, goes_on = (ends[0], int(begins[most])), True
            of_teacher, begins = of_teacher[:most], begins[:most]
        found = align(np.concatenate(student), begins, ends)
        size = len(found.student)
        # Token i of the student is the label of the sample's place first + i - 1.
        unread = np.append(True, ~counted[text.first : text.first + size - 1])[:size]
        untold = np.zeros(len(of_teacher), bool)
        untold[: 0 if len(prefix) else 1] = True
        if goes_on:
            untold[self._unsure_from(of_teacher, sure) :] = True
        found = found.without(found.having(unread, untold))
        labels = np.flatnonzero(found.student >= 0)
        if not len(labels):
            return None
        numbers, at = np.unique(found.student[labels], return_index=True)
        first_of = np.zeros(found.chunks, np.int64)
        first_of[numbers] = text.first + labels[at] - 1
        places[text.first + labels - 1] = first_of[found.student[labels]]
        base = text.sample * len(places)
        told = np.where(found.teacher >= 0, base + first_of[found.teacher], nowhere)
        return _Row(prefix, of_teacher, told)

    def _unsure_from(self, ids: np.ndarray, sure: int) -> int:
        """Of a text that goes on, the first token that might have been another; not one of the
        first ``sure``, up to the last special token."""
        first = max(len(ids) - _CUT_SHORT, min(sure, len(ids)))
        for place in range(len(ids) - 1, first, -1):
            if (self._teacher.pieces[ids[place]] or b"x")[0] in _WHITE:
                return place
        return first


def _whole(row: _Row, nowhere: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, labels and numbers of a text that is read at once, up to the last that is told."""
    front, ids, told = row
    whole = np.concatenate([front, ids])
    told = np.concatenate([np.full(len(front), nowhere), told])
    stop = int(np.flatnonzero(told != nowhere)[-1]) + 1
    return whole[: stop - 1], whole[1:stop], told[1:stop]


def _part(
    row: _Row, span: Span, prefix: np.ndarray, nowhere: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Of a span of a text; None where nothing in it is told."""
    front = prefix if span.begin else row.front
    own = slice(span.begin, span.end + 1)
    told = row.told[own].copy()
    told[: span.first - span.begin + bool(span.first)] = nowhere  # by the span before
    if not (told != nowhere).any():
        return None
    return _whole(_Row(front, row.ids[own], told), nowhere)


def _reading(
    rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], places: np.ndarray
) -> Reading:
    none = [np.zeros(0, np.int64)]
    inputs, labels, numbers = (
        np.concatenate(none + [row[part] for row in rows]) for part in range(3)
    )
    lengths = np.array([len(row[0]) for row in rows], np.int64)
    return Reading(lengths, inputs.astype(np.int32), labels.astype(np.int32), numbers, places)


def _half_letter(raw: bytes) -> int:
    """Bytes at the beginning that belong to a letter which began before."""
    behind = (i for i, byte in enumerate(raw[:4]) if not 0x80 <= byte < 0xC0)
    return next(behind, min(len(raw), 3))


def _readable(raw: bytes) -> tuple[bytes, bool]:
    """The beginning that is UTF-8, and whether nothing but the beginning of a letter follows."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return raw[: error.start], error.reason == "unexpected end of data"
    return raw, True
