"""How often some ids occur in the beginning of a text that Megatron prepared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

READ = 1 << 20
"""Tokens at the beginning of each text that are counted in: a few MiB."""
_SHOWN = 6


def occurrences(texts: Sequence[str], tokens: Mapping[int, str]) -> str:
    """A clause that says how often ``tokens``, text by id, occur, and where they were counted.

    Args:
        texts: path prefixes of Megatron's indexed data sets.
        tokens: text by id.
    """
    read, counts = 0, dict.fromkeys(sorted(tokens), 0)
    for text in texts:
        part = _beginning(text)
        if part is None:
            continue
        read += len(part)
        for index in counts:
            counts[index] += int((part == index).sum())
    if not read:
        return "how often they occur was not counted"
    there = {index: number for index, number in counts.items() if number}
    counted = f"the first {READ:,} tokens of each of its {len(texts)} texts ({read:,} in all)"
    if not there:
        return f"they do not occur in {counted}"
    examples = [f"{i} {tokens[i]!r} {number:,} times" for i, number in there.items()][:_SHOWN]
    more = f" and {len(there) - _SHOWN} others" if len(there) > _SHOWN else ""
    return f"in {counted} occur {', '.join(examples)}{more}"


def _beginning(text: str) -> np.ndarray | None:
    """The first tokens of a data set; None where it is none on this machine's file systems."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset, get_bin_path

    try:
        data = IndexedDataset(text, mmap=True)
        with open(get_bin_path(text), "rb") as file:
            return np.fromfile(file, dtype=data.index.dtype, count=READ)
    except (OSError, AssertionError, ValueError):
        return None  # Megatron says what is wrong when it builds the data
