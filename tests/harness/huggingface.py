"""Tiny random Hugging Face models."""

from pathlib import Path

import torch

from megatron_moe_inject.teachers import (
    StudentTokenizer,
    check_teacher,
)

IDS = 96
SIZES = {
    "vocab_size": IDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
STUDENT = StudentTokenizer("NullTokenizer", vocab_size=IDS)


def save(folder: Path, config) -> torch.nn.Module:
    """A random model of that configuration, also in ``folder``; the same numbers each time."""
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(str(folder))
    return model


def check(folder: Path, student=STUDENT):
    return check_teacher("coder", f"hf:{folder}", student_tokenizer=student)
