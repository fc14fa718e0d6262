"""Hugging Face folders in the shapes of the quickstart's models, for ``moe-inject export-hf``.

    python folders.py FOLDER        FOLDER/teacher (a Llama) and FOLDER/student (a Mixtral), random

A model that was imported has the folder that it came from; these two were pretrained in Megatron,
so that there is none. ``export-hf`` puts the values of a checkpoint into such a folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import transformers

TOKENIZER = Path(__file__).resolve().parents[1] / "quickstart" / "tokenizer"
COMMON = dict(
    vocab_size=2048,
    num_hidden_layers=4,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)


def main() -> None:
    teacher = transformers.LlamaConfig(
        hidden_size=160, num_attention_heads=5, intermediate_size=400, **COMMON
    )
    student = transformers.MixtralConfig(
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=128,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=None,
        **COMMON,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    for name, config in (("teacher", teacher), ("student", student)):
        folder = Path(sys.argv[1]) / name
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
