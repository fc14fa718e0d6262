"""Small real tokenizers of several kinds, trained on this repository's own text."""

from __future__ import annotations

import json
import string
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[2]
END = "<|end|>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def texts() -> tuple[str, ...]:
    """Prose and code: pages and modules of the package, as documents."""
    package = ROOT / "megatron_moe_inject"
    paths = [*sorted(package.glob("*/README.md")), *sorted((package / "losses").glob("*.py"))]
    return tuple(path.read_text("utf-8")[:6000] for path in paths)


def byte_level(folder: Path, size: int = 320, part: int = 0) -> Path:
    """Byte-level BPE, as GPT-2's, trained on every second document from ``part`` on."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts()[part::2], trainer)
    return _saved(folder, json.loads(tokenizer.to_str()), eos_token=END)


def letters(folder: Path, size: int) -> Path:
    """Byte-level, each id one character and no merges; the last of so many ids is the end."""
    text = (string.ascii_lowercase + string.ascii_uppercase + string.digits)[: size - 1]
    assert len(text) == size - 1, size
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(text)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return _saved(folder, json.loads(tokenizer.to_str()), eos_token=END)


def sentencepiece(folder: Path, size: int = 500, kind: str = "BPE", fallback: bool = True) -> Path:
    """SentencePiece with byte fallback as ``tokenizers`` has it, as Llama 2's: a space in front."""
    special = ["<unk>", "<s>", "</s>", *(BYTES if fallback else [])]
    if kind == "BPE":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=fallback, fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.train_from_iterator(texts(), trainer)
    content = json.loads(tokenizer.to_str())
    added = content["added_tokens"]
    content["added_tokens"] = [entry for entry in added if entry["content"] not in BYTES]
    if fallback:
        content["model"]["byte_fallback"] = True
    return _saved(folder, content, eos_token="</s>", bos_token="<s>", add_bos_token=True)


def prepending(folder: Path, source: Path) -> Path:
    """The same with the normaliser of Llama 2's converted files: a space in front of every text,
    of one that begins with a space, too."""
    content = json.loads((source / "tokenizer.json").read_text("utf-8"))
    content["pre_tokenizer"] = None
    content["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ],
    }
    return _saved(folder, content, eos_token="</s>", bos_token="<s>")


def lower_case(folder: Path, source: Path) -> Path:
    """A tokenizer that changes text before it cuts it."""
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    return _saved(folder, json.loads(tokenizer.to_str()), eos_token=END)


def word_piece(folder: Path) -> Path:
    """WordPiece, which gives no bytes back."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(
        vocab_size=250, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(texts()[:4], trainer)
    return _saved(folder, json.loads(tokenizer.to_str()))


def _saved(folder: Path, content: dict, **named: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
