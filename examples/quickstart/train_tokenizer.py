"""Trains the quickstart's byte-level BPE tokenizer and writes the folder that Megatron loads.

Both kinds of text weigh the same, and only training documents are read, so that bits per byte on
held-out text is honest for either. A small vocabulary keeps the shipped models small. Teacher and
student share the tokenizer, which is what makes their distributions comparable.
"""

from __future__ import annotations

import json

import corpora
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 2048
END = "<|endoftext|>"


def main() -> None:
    english, code, _ = corpora.read_documents(with_tests=False)
    english, code = (corpora.split(documents)[0] for documents in (english, code))
    size = min(sum(len(d.text) for d in documents) for documents in (english, code))
    texts = [d.text for documents in (english, code) for d in corpora.take_bytes(documents, size)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    corpora.TOKENIZER.mkdir(exist_ok=True)
    tokenizer.save(str(corpora.TOKENIZER / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
    }
    path = corpora.TOKENIZER / "tokenizer_config.json"
    path.write_text(json.dumps(settings, indent=1) + "\n")
    print(f"{tokenizer.get_vocab_size()} entries from {sum(map(len, texts)):,d} characters")


if __name__ == "__main__":
    main()
