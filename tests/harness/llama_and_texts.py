"""A tiny Llama and two data sets, for ``moe-inject store-teacher`` on one process."""

from pathlib import Path

import numpy as np
import torch
import transformers
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


def llama_and_texts(folder: Path, rows: int, ids: int) -> None:
    """Write ``llama``, with so many rows of its vocabulary, and the data sets ``general`` and
    ``code``, 30 documents of up to 89 of so many ids each."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=rows, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=16, max_position_embeddings=64,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(str(folder / "llama"))
    rng = np.random.default_rng(0)
    for name in ("general", "code"):
        builder = IndexedDatasetBuilder(f"{folder / name}.bin", dtype=np.uint16)
        for length in rng.integers(0, 90, 30).tolist():
            builder.add_document(torch.from_numpy(rng.integers(0, ids, length)), [length])
        builder.finalize(f"{folder / name}.idx")
