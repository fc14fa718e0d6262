"""Tables, counts and sizes as plain text, for job logs."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows of cells as aligned lines; columns in ``right`` are flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def count(value: int) -> str:
    """A number of parameters in three digits: 12,345,678 -> "12.3 M"."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size:
            digits = max(0, 3 - len(str(value // size)))
            return f"{value / size:.{digits}f} {unit}"
    return str(value)


def memory_text(size: int) -> str:
    """Bytes in binary units: 3221225472 -> "3.0 GiB"."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << power:
            return f"{size / (1 << power):.1f} {unit}"
    return f"{size} B"


def ranges(ids: tuple[int, ...] | list[int]) -> str:
    """``(0, 2, 3, 4)`` as "0, 2-4"."""
    runs: list[list[int]] = []
    for i in sorted(ids):
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def is_whole(text: str) -> bool:
    """Whether UTF-8 has it: JSON can hold half a character (a lone surrogate), no tokenizer can."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
