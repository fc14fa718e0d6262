"""Whether student and teacher speak of the same tokens.

Distillation compares the two distributions id by id, so the tokenizers must be the same; only
the padding of the tables may differ. Where both vocabularies can be read they are compared
token by token. Otherwise sizes are all there is: they must agree as far as they are known, and
a size that is known only with padding stands for the range that this padding leaves open.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_moe_inject.teachers.base import Source
from megatron_moe_inject.teachers.tokenizer_files import (
    UnreadableTokenizer,
    read_token_ids,
    with_special_tokens,
)

COMMON_PADDING = 1024
"""Rows by which published checkpoints are padded beyond their vocabulary, at most."""

_FILE_TYPES = (
    "HuggingFaceTokenizer",
    "SFTTokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
)
_VOCAB_FILE_TYPES = ("GPT2BPETokenizer", "BertWordPieceLowerCase", "BertWordPieceCase")
_SHOWN = 3


@dataclass(frozen=True)
class Vocabulary:
    """What is known of one side's ids.

    Attributes:
        origin: where it comes from, for messages.
        size: ids in use; None where the tokenizer cannot be read.
        rows: size of the embedding, padding included; None where unknown.
        padding: how many rows padding may add, at most, plus one.
        ids: token to id; None where the tokenizer cannot be read.
        unreadable: why ``ids`` is None.
    """

    origin: str
    size: int | None = None
    rows: int | None = None
    padding: int = COMMON_PADDING
    ids: Mapping[str, int] | None = None
    unreadable: str = ""

    def sizes(self) -> range | None:
        """Possible numbers of ids in use; None where nothing is known."""
        if self.size is not None:
            return range(self.size, self.size + 1)
        if self.rows is not None:
            return range(max(1, self.rows - self.padding + 1), self.rows + 1)
        return None

    def extent(self) -> str:
        """The number of ids in words."""
        sizes = self.sizes()
        if sizes is None:
            return "of unknown size"
        exact = f"{sizes[0]} ids"
        return exact if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} ids"


def vocabulary_of_files(path: Path, *, origin: str, **known) -> Vocabulary:
    """The vocabulary of a tokenizer folder or file; ``known`` are further fields."""
    try:
        ids = read_token_ids(path)
    except UnreadableTokenizer as error:
        return Vocabulary(origin, unreadable=str(error), **known)
    return Vocabulary(origin, size=max(ids.values()) + 1, ids=ids, **known)


@dataclass(frozen=True)
class TokenizerFlags:
    """Megatron's tokenizer flags, those of the student or those stored with a teacher.

    Attributes:
        type: ``--tokenizer-type``.
        model: ``--tokenizer-model``.
        vocab_file: ``--vocab-file``.
        special_tokens: ``--tokenizer-special-tokens``.
        vocab_size: ``--vocab-size``.
        padded_vocab_size: rows of the embedding, once Megatron has computed them.
        padding: rows that padding may add, at most, plus one.
    """

    type: str | None
    model: str | None = None
    vocab_file: str | None = None
    special_tokens: tuple[str, ...] = ()
    vocab_size: int | None = None
    padded_vocab_size: int | None = None
    padding: int = COMMON_PADDING

    @classmethod
    def from_args(cls, args: Namespace) -> TokenizerFlags:
        """From Megatron's parsed arguments; flags that its version lacks count as not given."""
        multiple = getattr(args, "make_vocab_size_divisible_by", None) or 128
        parallel = getattr(args, "tensor_model_parallel_size", None) or 1
        return cls(
            type=getattr(args, "tokenizer_type", None),
            model=getattr(args, "tokenizer_model", None),
            vocab_file=getattr(args, "vocab_file", None),
            special_tokens=tuple(getattr(args, "special_tokens", None) or ()),
            vocab_size=getattr(args, "vocab_size", None),
            padded_vocab_size=getattr(args, "padded_vocab_size", None),
            padding=max(COMMON_PADDING, multiple * parallel),
        )

    def vocabulary(self, saved_with_model: Path | None = None) -> Vocabulary:
        """Read the tokenizer's files as data. No collective.

        Args:
            saved_with_model: folder to read instead where the flags name no file of this
                machine.
        """
        origin = f"{self.type} {self.model or self.vocab_file or ''}".strip()
        known = {"rows": self.padded_vocab_size, "padding": self.padding}
        if self.type in ("NullTokenizer", "NullMultimodalTokenizer"):
            why = "NullTokenizer has no tokens"
            return Vocabulary(origin, size=self.vocab_size, unreadable=why, **known)
        path = self._path()
        if (path is None or not path.exists()) and saved_with_model is not None:
            path = saved_with_model if saved_with_model.is_dir() else path
        if path is None:
            why = f"vocabularies of {self.type} cannot be read"
            return Vocabulary(origin, unreadable=why, **known)
        found = vocabulary_of_files(path, origin=origin, **known)
        if found.ids is None:
            return found
        ids = with_special_tokens(found.ids, self.special_tokens)
        return dataclasses.replace(found, ids=ids, size=max(ids.values()) + 1)

    def _path(self) -> Path | None:
        if self.type in _VOCAB_FILE_TYPES and self.vocab_file:
            return Path(self.vocab_file)
        if self.type not in _FILE_TYPES or not self.model:
            return None
        path = Path(self.model)
        if path.is_dir() and self.vocab_file:
            return Path(self.vocab_file)
        return path if path.exists() else _cached_hub_file(self.model) or path


def _cached_hub_file(name: str) -> Path | None:
    """``tokenizer.json`` of a Hugging Face hub name that was downloaded before; no network."""
    if importlib.util.find_spec("huggingface_hub") is None or name.count("/") > 1:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def check_vocabulary(student: Vocabulary, teacher: Vocabulary, source: Source) -> str:
    """Compare the two and say in one sentence what was compared.

    Raises:
        RecipeError: they differ; the message shows the first tokens or the sizes that do.
    """
    if student.ids is not None and teacher.ids is not None:
        _compare_tokens(student.ids, teacher.ids, source)
        compared = f"the same {len(teacher.ids)} tokens as the student's"
    else:
        unread = [v for v in (student, teacher) if v.ids is None]
        why = "; ".join(dict.fromkeys(v.unreadable for v in unread if v.unreadable))
        if student.sizes() is None or teacher.sizes() is None:
            return f"not compared: {why or 'no size is known'}"
        _compare_sizes(student, teacher, source)
        compared = f"sizes agree ({teacher.extent()}), tokens not compared: {why}"
    if student.size is not None and teacher.rows is not None and teacher.rows < student.size:
        raise source.error(
            f"has {teacher.rows} embedding rows for the student's {student.size} ids",
            "use a teacher with the student's tokenizer",
        )
    return compared


def _compare_tokens(student: Mapping[str, int], teacher: Mapping[str, int], source: Source) -> None:
    differing = set(student.items()) ^ set(teacher.items())
    if not differing:
        return
    ids = sorted({index for _, index in differing})
    by_id = [
        {index: token for token, index in side.items() if index in ids[:_SHOWN]}
        for side in (student, teacher)
    ]
    shown = ", ".join(
        f"id {index} is {_quoted(by_id[0].get(index))} for the student "
        f"and {_quoted(by_id[1].get(index))} for the teacher"
        for index in ids[:_SHOWN]
    )
    raise source.error(
        f"has another tokenizer, {len(ids)} ids differ: {shown}",
        "use a teacher with the student's tokenizer",
    )


def _quoted(token: str | None) -> str:
    return "nothing" if token is None else repr(token)


def _compare_sizes(student: Vocabulary, teacher: Vocabulary, source: Source) -> None:
    ours, theirs = student.sizes(), teacher.sizes()
    if max(ours[0], theirs[0]) > min(ours[-1], theirs[-1]):
        raise source.error(
            f"has another vocabulary: {teacher.extent()} ({teacher.origin}) against the "
            f"student's {student.extent()} ({student.origin})",
            "use a teacher with the student's tokenizer",
        )
