"""Where two tokenizations of one text cut it at the same bytes, and what lies between.

A text is a line of bytes. Each side's tokens begin at some of them; an end of document and its
like, which both sides have as one token, count as one byte. A *chunk* lies between two neighbouring
places where a token of either side begins (or the text ends): the smallest pieces that both sides
have in whole tokens. Tokens without bytes, such as a space in front that is none of the text's,
belong to the chunk that they stand before.

Shapes: t_s, t_t tokens of student and teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Alignment:
    """The chunks of a text.

    Attributes:
        student: ``[t_s]`` int64, the chunk of each of its tokens, from 0 on; -1 for none.
        teacher: ``[t_t]`` likewise.
        chunks: how many there are.
    """

    student: np.ndarray
    teacher: np.ndarray
    chunks: int

    def without(self, bad: np.ndarray) -> Alignment:
        """The same without some chunks, ``[chunks]`` bool; the others keep their numbers."""
        return Alignment(_left(self.student, bad), _left(self.teacher, bad), self.chunks)

    def having(self, student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
        """``[chunks]`` bool, chunks with one of these tokens, ``[t_s]`` and ``[t_t]`` bool."""
        having = np.zeros(self.chunks, bool)
        for numbers, wanted in ((self.student, student), (self.teacher, teacher)):
            having[numbers[wanted & (numbers >= 0)]] = True
        return having


def align(student: np.ndarray, teacher: np.ndarray, ends: tuple[int, int]) -> Alignment:
    """Find the chunks.

    Args:
        student: ``[t_s]`` int64, the byte at which each of its tokens begins, never falling.
        teacher: ``[t_t]`` likewise.
        ends: behind the last byte of the student's and of the teacher's tokens.

    A token that covers bytes which the other side does not have is in no chunk.
    """
    borders = np.intersect1d(np.append(student, ends[0]), np.append(teacher, ends[1]))
    chunks = max(len(borders) - 1, 0)
    return Alignment(_numbers(student, borders), _numbers(teacher, borders), chunks)


def _numbers(starts: np.ndarray, borders: np.ndarray) -> np.ndarray:
    numbers = np.searchsorted(borders, starts, side="right") - 1
    return np.where(numbers < len(borders) - 1, numbers, -1)


def _left(numbers: np.ndarray, bad: np.ndarray) -> np.ndarray:
    if not len(bad):
        return numbers
    return np.where((numbers >= 0) & ~bad[numbers], numbers, -1)
