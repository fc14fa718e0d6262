"""Two small Megatron datasets that differ, over a NullTokenizer vocabulary."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

VOCAB = 60
"""Ids of the text; id 60 is the end of a document for ``--vocab-size 61``."""


def write_corpora(folder: Path, documents: int = 40, length: int = 300) -> list[str]:
    """Write ``general`` and ``domain`` and return their prefixes, in that order.

    General documents count up by one, domain documents by seven, both with a little noise, so
    that a model can tell them apart and learn either.
    """
    rng = np.random.default_rng(0)
    strides = {"general": 1, "domain": 7}
    return [
        write_corpus(folder / name, stride, rng, documents, length)
        for name, stride in strides.items()
    ]


def write_corpus(
    prefix: Path, stride: int, rng: np.random.Generator, documents: int = 40, length: int = 300
) -> str:
    """Write one whose documents count up by ``stride``, with a little noise; returns its prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(documents):
        start = rng.integers(VOCAB)
        tokens = (start + stride * np.arange(length)) % VOCAB
        noise = rng.random(length) < 0.1
        tokens[noise] = rng.integers(VOCAB, size=noise.sum())
        builder.add_document(torch.from_numpy(tokens), [length])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def write_apart(folder: Path, names: Sequence[str], documents: int = 40) -> list[str]:
    """Write a data set for each name, of ids of its own; return their prefixes.

    A token alone tells which it is from, so that a student which has learned little can, too.
    """
    rng = np.random.default_rng(0)
    size, length = VOCAB // len(names), 300
    prefixes = []
    for number, name in enumerate(names):
        prefix = folder / name
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        for _ in range(documents):
            tokens = (rng.integers(size) + (number + 1) * np.arange(length)) % size
            builder.add_document(torch.from_numpy(number * size + tokens), [length])
        builder.finalize(f"{prefix}.idx")
        prefixes.append(str(prefix))
    return prefixes


def write_prepared(folder: Path) -> None:
    """The same with held-out text, under the names that ``moe-inject prepare-data`` gives."""
    write_corpora(folder)
    for path in list(folder.iterdir()):
        (folder / f"{path.stem}_held_out{path.suffix}").write_bytes(path.read_bytes())
