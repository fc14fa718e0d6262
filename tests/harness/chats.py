"""Conversations for ``--sft`` and a tokenizer with their template's tokens."""

import json
from pathlib import Path

import numpy as np

PER_PACK = 4
WORDS = 50
_OTHERS = ("<unk>", "<eod>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>")
_ROLES = ("System", "User", "Assistant")


def write_tokenizer(folder: Path) -> Path:
    """61 ids, as many as the tests' student has: words, the template's tokens, and some unused."""
    tokens = [*(f"w{i}" for i in range(WORDS)), *_ROLES, *_OTHERS]
    tokens += [f"x{i}" for i in range(61 - len(tokens))]
    vocab = {token: i for i, token in enumerate(tokens)}
    added = [
        {"id": vocab[token], "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for token in _OTHERS
    ]
    model = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder")),
    }
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(model))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"eos_token": "<eod>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def conversation(number: int, stride: int) -> list[dict[str, str]]:
    """Of one question and one answer of uneven length."""
    rng = np.random.default_rng(number)

    def words(count: int) -> str:
        ids = (rng.integers(WORDS) + stride * np.arange(count)) % WORDS
        return " ".join(f"w{i}" for i in ids)

    texts = {"system": words(1), "user": words(rng.integers(1, 3)), "assistant": ""}
    texts["assistant"] = words(rng.integers(3, 7))
    return [{"role": role, "content": text} for role, text in texts.items()]


def write_chats(folder: Path, per_line: int, packs: int = 40) -> list[str]:
    """``general`` and ``domain`` of the same conversations, so many in a line; their paths."""
    folder.mkdir(exist_ok=True)
    paths = []
    for stride in (1, 7):
        of_file = [conversation(100 * stride + i, stride) for i in range(packs * PER_PACK)]
        lines = [
            json.dumps({"messages": [turn for own in of_file[i : i + per_line] for turn in own]})
            for i in range(0, len(of_file), per_line)
        ]
        path = folder / f"chats-{stride}.jsonl"
        path.write_text("\n".join(lines) + "\n")
        paths.append(str(path))
    return paths
