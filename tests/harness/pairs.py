"""Pairs of answers for the tests: what a domain goes on with is preferred to what it does not."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from tests.harness.corpus import VOCAB
from tests.harness.material import Material


def write_pairs(prefix: Path, pairs: int = 60, seed: int = 0, lengths: tuple = (4, 9)) -> str:
    """Write pairs of uneven lengths over the vocabulary of ``corpus``; returns the prefix.

    Prompts count up by one, chosen answers go on by seven and rejected ones by one.
    """
    rng = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(pairs):
        sizes = rng.integers(*lengths, size=3)
        prompt = (rng.integers(VOCAB) + np.arange(sizes[0])) % VOCAB
        answers = [
            (prompt[-1] + stride * np.arange(1, size + 1)) % VOCAB
            for stride, size in zip((7, 1), sizes[1:], strict=True)
        ]
        parts = [prompt, *answers]
        builder.add_document(torch.from_numpy(np.concatenate(parts)), [len(x) for x in parts])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def data_flags(
    material: Material, pairs: str, *more: str, held_out: str | None = None
) -> tuple[str, ...]:
    """Entry 0 is general, entry 1 the domain, entry 2 pairs, with others held out, or none; then
    ``more`` text."""
    text = (material.general, material.domain)
    own = () if held_out is None else (held_out,)
    return (
        *("--train-data-path", *text, pairs, *more),
        *("--valid-data-path", *text, *own, *more),
    )


def of_held_out(output: str) -> list[dict[str, float]]:
    """What a run has logged of held-out pairs, an evaluation each."""
    found = []
    for line in output.splitlines():
        if " validation loss at " in line and "| preference " in line:
            told = re.findall(r"\| (preference [^|]*?) value: (\S+)", line)
            found.append({name: float(value) for name, value in told})
    return found
