"""Writes a random Mixtral of the quickstart's student's shape: what ``export-hf`` is to be like.

    python as_mixtral.py FOLDER

The student's router, experts and attention are Mixtral's, so that ``transformers`` runs it and an
``hf:`` teacher needs nothing of Megatron's.
"""

from __future__ import annotations

import sys
from pathlib import Path

TOKENIZER = Path(__file__).resolve().parents[1] / "quickstart" / "tokenizer"
VOCABULARY = 2048


def write(folder: Path) -> None:
    """The folder, with the quickstart's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        sliding_window=None,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
