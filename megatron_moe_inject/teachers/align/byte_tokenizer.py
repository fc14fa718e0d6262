"""A tokenizer by its bytes: which bytes each id stands for, and which ids a text becomes.

Two tokenizers can be compared where both say exactly which bytes of a text each token covers.
Understood are

- byte-level BPE (GPT-2, Llama 3, Qwen, DeepSeek): ``tokenizer.json``, or ``vocab.json`` with
  ``merges.txt``; each letter of a token stands for a byte;
- SentencePiece with byte fallback (Llama 2, Gemma, Mistral): ``tokenizer.json`` or ``*.model``; a
  token is UTF-8 text with U+2581 for a space, or ``<0xAB>`` for a byte.

Refused are tokenizers that cannot give bytes back: WordPiece and word lists (white space is lost),
and SentencePiece without byte fallback (what it lacks is lost). Special tokens, such as an end of
document, have no bytes.

Some tokenizers put a space in front of a text that is none of its own; ``space_in_front`` says so.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moe_inject.teachers.tokenizer_files import (
    UnreadableTokenizer,
    named_tokens,
    read_added_tokens,
    read_token_ids,
)

_SPACE = "\u2581"
_PROBE = (
    "Ab  Cd\tdé ü ﬁ ² Ⅳ\n\n \U0001f600 漢字 한 e\u0301x'll 1234.5 \r\n\u00a0__init__(self)\n\t}"
)
"""What a tokenizer must give back: case, accents, ligatures, and all kinds of white space."""
Encode = Callable[[list[str]], list[Sequence[int]]]


@dataclass(frozen=True)
class ByteTokenizer:
    """Ids, their bytes, and what has none.

    Attributes:
        origin: where it is from, for messages.
        pieces: by id, its bytes; None for ids without any: special tokens, and those of nothing.
        specials: ids of special tokens, by their names.
        end: id of the end of a document, None without one.
        begin: id of the beginning of a text, likewise.
        encode: ids of texts, without what stands in front of or behind one; a text that holds the
            name of a special token is text.
    """

    origin: str
    pieces: Sequence[bytes | None]
    specials: Mapping[str, int]
    end: int | None
    begin: int | None
    encode: Encode

    @cached_property
    def lengths(self) -> np.ndarray:
        """Bytes of each id, int64; 0 without any."""
        return np.array([len(piece or b"") for piece in self.pieces], dtype=np.int64)

    @cached_property
    def textless(self) -> np.ndarray:
        """Which ids have no bytes, bool."""
        return np.array([piece is None for piece in self.pieces])

    @cached_property
    def names(self) -> Mapping[int, str]:
        """Names of special tokens by id."""
        return {index: name for name, index in self.specials.items()}

    @cached_property
    def space_in_front(self) -> bool:
        """Whether a text is encoded with a space in front."""
        (ids,) = self.encode(["a"])
        return self.bytes_of(ids).startswith(b" ")

    def one(self, text: str) -> Sequence[int]:
        """Ids of a text."""
        (ids,) = self.encode([text])
        return ids

    def bytes_of(self, ids: Sequence[int]) -> bytes:
        """Bytes of ids one after the other; nothing for those without."""
        pieces = self.pieces
        return b"".join([pieces[index] or b"" for index in ids])

    def check_exact(self) -> None:
        """Raise UnreadableTokenizer unless a text comes back as it was."""
        (ids,) = self.encode([_PROBE])
        text, back = _PROBE.encode(), self.bytes_of(ids)
        if back in (text, b" " + text):
            return
        at = next(
            (i for i, pair in enumerate(zip(text, back, strict=False)) if len({*pair}) > 1), 0
        )
        raise UnreadableTokenizer(
            f"it changes text: {text[at : at + 12]!r} comes back as {back[at : at + 12]!r}"
        )


def read_tokenizer(path: Path, more_specials: Sequence[str] = ()) -> ByteTokenizer:
    """The tokenizer of a folder or a file.

    Args:
        path: of ``teachers.vocabulary.TokenizerFlags.files``.
        more_specials: added at run time, numbered on.

    Raises:
        UnreadableTokenizer: it is of a kind that gives no bytes back, or is damaged; it says why.
    """
    try:
        found = _read(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableTokenizer(f"{path} is damaged ({error})") from error
    pieces, specials = list(found.pieces), dict(found.specials)
    for name in more_specials:
        if name not in specials:
            specials[name] = len(pieces)
            pieces.append(None)
    return ByteTokenizer(found.origin, pieces, specials, found.end, found.begin, found.encode)


def _read(path: Path) -> ByteTokenizer:
    folder = path if path.is_dir() else path.parent
    model = path if path.suffix == ".model" else folder / "tokenizer.model"
    whole = path if path.name == "tokenizer.json" else folder / "tokenizer.json"
    if whole.is_file() and path.suffix not in (".model", ".txt"):
        return _of_json(whole)
    if (folder / "vocab.json").is_file() and path.suffix not in (".model", ".txt"):
        return _of_merges(folder)
    if (folder / "vocab.txt").is_file() or path.suffix == ".txt":
        raise UnreadableTokenizer("WordPiece gives no bytes back: white space is lost")
    if model.is_file():
        return _of_sentencepiece(model)
    raise UnreadableTokenizer(f"{path} holds no tokenizer.json, vocab.json or tokenizer.model")


def _of_json(path: Path) -> ByteTokenizer:
    """A file of ``tokenizers``."""
    from tokenizers import Tokenizer

    content = json.loads(path.read_text("utf-8"))
    model = content["model"]
    kind = model.get("type") or ("Unigram" if isinstance(model["vocab"], list) else "BPE")
    if kind not in ("BPE", "Unigram"):
        raise UnreadableTokenizer(f"{kind} gives no bytes back: white space is lost")
    parts = {
        part["type"] for name in ("pre_tokenizer", "decoder") for part in _parts(content[name])
    }
    byte_level = "ByteLevel" in parts
    if not byte_level and not model.get("byte_fallback"):
        raise UnreadableTokenizer(
            f"{kind} without bytes (neither ByteLevel nor byte_fallback) gives no bytes back: what "
            "its tokens lack is lost"
        )
    piece = _by_letters if byte_level else _by_text
    ids = read_token_ids(path)
    added = {entry["id"]: entry for entry in content.get("added_tokens") or []}
    pieces: list[bytes | None] = [None] * (max(ids.values()) + 1)
    specials = {}
    lacking = _unknown(model)
    for token, index in ids.items():
        if index in added and added[index]["special"]:
            specials[token] = index
        elif index in added:
            pieces[index] = token.encode() if byte_level else _by_text(token)
        elif token != lacking:
            pieces[index] = piece(token)
    tokenizer = Tokenizer.from_file(str(path))
    return _with_roles(path.parent, str(path), pieces, specials, _encoder(tokenizer))


def _parts(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """A part of a tokenizer, and those of a sequence."""
    if part is None:
        return []
    inner = part.get("pretokenizers") or part.get("decoders") or []
    return [part, *(deeper for each in inner for deeper in _parts(each))]


def _unknown(model: Mapping[str, Any]) -> str | None:
    """What stands for all that a model lacks."""
    if model.get("unk_id") is not None:
        token = model["vocab"][model["unk_id"]][0]
        return token if isinstance(token, str) else None
    return model.get("unk_token")


def _encoder(tokenizer: Any) -> Encode:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True

    def encode(texts: list[str]) -> list[Sequence[int]]:
        return [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    return encode


def _of_merges(folder: Path) -> ByteTokenizer:
    """``vocab.json`` and ``merges.txt`` of GPT-2; without merges, ids can be read but none made."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    ids, special = read_token_ids(vocabulary), read_added_tokens(vocabulary)
    ids = dict(ids)
    for token in special - ids.keys():
        raise UnreadableTokenizer(f"{vocabulary} lacks the added token {token!r}")
    special = special | ({"<|endoftext|>"} & ids.keys())
    pieces: list[bytes | None] = [None] * (max(ids.values()) + 1)
    for token, index in ids.items():
        if token not in special:
            pieces[index] = _by_letters(token)
    specials = {token: ids[token] for token in special}
    if not merges.is_file():
        raise UnreadableTokenizer(f"{folder} holds no merges.txt beside vocab.json")
    tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _with_roles(folder, str(vocabulary), pieces, specials, _encoder(tokenizer))


def _of_sentencepiece(path: Path) -> ByteTokenizer:
    """A model of ``sentencepiece``."""
    if importlib.util.find_spec("sentencepiece") is None:
        raise UnreadableTokenizer("the sentencepiece package is not installed")
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise UnreadableTokenizer(f"{path} is damaged ({error})") from error
    every = range(model.get_piece_size())
    if not any(model.is_byte(index) for index in every):
        raise UnreadableTokenizer(
            "SentencePiece without byte fallback gives no bytes back: what its tokens lack is lost"
        )
    pieces: list[bytes | None] = []
    specials = {}
    for index in every:
        token = model.id_to_piece(index)
        if model.is_control(index):
            specials[token] = index
        no_text = model.is_control(index) or model.is_unknown(index) or model.is_unused(index)
        pieces.append(None if no_text else _by_text(token))
    end, begin = (i if i >= 0 else None for i in (model.eos_id(), model.bos_id()))
    named = _with_roles(path.parent, str(path), pieces, specials, model.encode)
    return ByteTokenizer(
        named.origin,
        pieces,
        specials,
        named.end if named.end is not None else end,
        named.begin if named.begin is not None else begin,
        model.encode,
    )


def _with_roles(
    folder: Path,
    origin: str,
    pieces: Sequence[bytes | None],
    specials: Mapping[str, int],
    encode: Encode,
) -> ByteTokenizer:
    """With the ids of the roles that a folder's files name."""
    roles = named_tokens(folder)
    end, begin = (specials.get(roles.get(role, "")) for role in ("eos_token", "bos_token"))
    if end is None:
        end = specials.get("<|endoftext|>", specials.get("</s>"))
    return ByteTokenizer(origin, pieces, specials, end, begin, encode)


def _by_text(token: str) -> bytes:
    """Bytes of a token of SentencePiece."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE, " ").encode()


def _letters() -> dict[str, int]:
    """The byte of each letter of a byte-level token: printable ones are themselves, the others
    follow from U+0100 on, as GPT-2 numbered them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }


_BYTE_OF = _letters()


def _by_letters(token: str) -> bytes | None:
    """Bytes of a byte-level token; None for one of other letters, which no text becomes."""
    if not all(letter in _BYTE_OF for letter in token):
        return None
    return bytes([_BYTE_OF[letter] for letter in token])
