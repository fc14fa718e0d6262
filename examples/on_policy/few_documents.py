"""Writes the first documents of a data set as one of its own: a corpus that is soon read again.

python few_documents.py SOURCE TARGET COUNT
"""

from __future__ import annotations

import sys

import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder


def main(source: str, target: str, count: int) -> None:
    data = IndexedDataset(source)
    builder = IndexedDatasetBuilder(f"{target}.bin", dtype=data.index.dtype)
    for number in range(min(count, len(data))):
        document = data[number]
        builder.add_document(torch.from_numpy(document.astype("int64")), [len(document)])
    builder.finalize(f"{target}.idx")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
