"""Token-to-id maps from tokenizer files, read as data: no tokenizer is built, no code runs."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class UnreadableTokenizer(Exception):
    """No token-to-id map can be had; the message says why, to follow "because"."""


def read_token_ids(path: Path) -> dict[str, int]:
    """The vocabulary of a tokenizer folder or file.

    Understood: ``tokenizer.json`` (Hugging Face ``tokenizers``), ``vocab.json`` (GPT-2 style),
    ``vocab.txt`` (WordPiece) and SentencePiece ``*.model``; in a folder, the first of these.

    Raises:
        UnreadableTokenizer: nothing there is understood, or it is damaged.
    """
    try:
        if path.is_dir():
            return _read_folder(path)
        if path.is_file():
            return _read_file(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableTokenizer(f"{path} is damaged ({error})") from error
    raise UnreadableTokenizer(f"{path} is not there")


def read_added_tokens(path: Path) -> frozenset[str]:
    """Tokens that a tokenizer has beside those of its model, such as chat, pad and image tokens.

    They stand for themselves: ordinary text is cut into tokens in the same way without them.
    Understood: ``added_tokens`` of ``tokenizer.json``, ``added_tokens.json`` and
    ``special_tokens_map.json``, and control and user-defined pieces of SentencePiece. Empty where
    ``read_token_ids`` finds nothing.
    """
    folder = path if path.is_dir() else path.parent
    try:
        tokens = set(_added_tokens(folder)) | set(named_tokens(folder).values())
        if (folder / "tokenizer.json").is_file() and path.suffix not in (".model", ".txt"):
            content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
            tokens |= {entry["content"] for entry in content.get("added_tokens") or []}
        elif path.suffix == ".model" or (path.is_dir() and (folder / "tokenizer.model").is_file()):
            tokens |= _control_pieces(folder / "tokenizer.model" if path.is_dir() else path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UnreadableTokenizer):
        return frozenset()  # what is damaged is reported by read_token_ids
    return frozenset(tokens)


def named_tokens(folder: Path) -> dict[str, str]:
    """Tokens with a role, such as ``bos_token``, from ``special_tokens_map.json`` and
    ``tokenizer_config.json``, which wins."""
    by_role: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        for role, token in json.loads((folder / name).read_text("utf-8")).items():
            text = token.get("content") if isinstance(token, dict) else token
            if role.endswith("_token") and isinstance(text, str):
                by_role[role] = text
    return by_role


def with_special_tokens(ids: Mapping[str, int], special_tokens: Iterable[str]) -> dict[str, int]:
    """``ids`` with new tokens numbered on, as tokenizers add them at run time."""
    numbered = dict(ids)
    for token in special_tokens:
        numbered.setdefault(token, max(numbered.values(), default=-1) + 1)
    return numbered


def _read_folder(folder: Path) -> dict[str, int]:
    for name in ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model"):
        if (folder / name).is_file():
            return _read_file(folder / name) | _added_tokens(folder)
    raise UnreadableTokenizer(f"{folder} holds no tokenizer.json, vocab.json or tokenizer.model")


def _added_tokens(folder: Path) -> dict[str, int]:
    path = folder / "added_tokens.json"
    return _as_ids(json.loads(path.read_text("utf-8"))) if path.is_file() else {}


def _read_file(path: Path) -> dict[str, int]:
    if path.suffix == ".model":
        return _sentencepiece(path)
    if path.suffix == ".txt":
        lines = path.read_text("utf-8").split("\n")
        return {token: index for index, token in enumerate(lines) if token}
    if path.suffix != ".json":
        raise UnreadableTokenizer(f"{path.name} is in no known tokenizer format")
    content = json.loads(path.read_text("utf-8"))
    if "model" not in content or not isinstance(content["model"], dict):
        return _as_ids(content)
    entries = content["model"]["vocab"]
    if isinstance(entries, list):  # Unigram: pairs of token and score, the position is the id
        ids = {token: index for index, (token, _) in enumerate(entries)}
    else:
        ids = _as_ids(entries)
    added = content.get("added_tokens") or []
    return ids | {entry["content"]: int(entry["id"]) for entry in added}


def _as_ids(content: Any) -> dict[str, int]:
    ids = dict(content)
    if not ids or not all(isinstance(index, int) for index in ids.values()):
        raise UnreadableTokenizer("a JSON file that maps no tokens to ids")
    return ids


def _sentencepiece(path: Path) -> dict[str, int]:
    model = _processor(path)
    return {model.id_to_piece(index): index for index in range(model.get_piece_size())}


def _control_pieces(path: Path) -> set[str]:
    model = _processor(path)
    every = range(model.get_piece_size())
    return {model.id_to_piece(i) for i in every if model.is_control(i) or model.is_unknown(i)}


def _processor(path: Path) -> Any:
    if importlib.util.find_spec("sentencepiece") is None:
        raise UnreadableTokenizer("the sentencepiece package is not installed")
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise UnreadableTokenizer(f"{path} is damaged ({error})") from error
