"""Whether student and teacher speak of the same tokens.

Distillation compares the two distributions id by id, so an id must stand for the same text on both
sides. Where both vocabularies can be read they are compared token by token. The teacher may have
ids that the student lacks: their rows take no part. The student may have added tokens that the
teacher lacks (ordinary ones not, since the same text would then be cut in other ways): the teacher
gives them no probability and cannot read what comes after one (``step_pass``).

Where a vocabulary cannot be read, sizes are all there is: they must agree as far as they are known,
and a size that is known only with padding stands for the range that this padding leaves open.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from argparse import Namespace
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_moe_inject.teachers.base import Comparison, Source
from megatron_moe_inject.teachers.tokenizer_files import (
    UnreadableTokenizer,
    read_added_tokens,
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
        added: of ``ids``, the tokens without which ordinary text is cut in the same way.
        unreadable: why ``ids`` is None.
    """

    origin: str
    size: int | None = None
    rows: int | None = None
    padding: int = COMMON_PADDING
    ids: Mapping[str, int] | None = None
    added: frozenset[str] = frozenset()
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


def vocabulary_of_files(
    path: Path, *, origin: str, rows: int | None, padding: int = COMMON_PADDING
) -> Vocabulary:
    """The vocabulary of a tokenizer folder or file; see ``Vocabulary`` for the arguments."""
    try:
        ids = read_token_ids(path)
    except UnreadableTokenizer as error:
        return Vocabulary(origin, rows=rows, padding=padding, unreadable=str(error))
    added = read_added_tokens(path)
    return Vocabulary(origin, max(ids.values()) + 1, rows, padding, ids, added)


def within_rows(own: Vocabulary, source: Source, remedy: str) -> Vocabulary:
    """A teacher's vocabulary without added tokens that its embedding has no row for.

    Raises:
        RecipeError: an ordinary token has no row, so that model and tokenizer do not belong
            together; ``remedy`` says what to do.
    """
    if own.size is None or own.rows is None or own.size <= own.rows:
        return own
    if own.ids is None or any(i >= own.rows and t not in own.added for t, i in own.ids.items()):
        raise source.error(
            f"has {own.rows} embedding rows for a tokenizer with {own.size} ids", remedy
        )
    ids = {token: index for token, index in own.ids.items() if index < own.rows}
    return dataclasses.replace(own, ids=ids, size=max(ids.values()) + 1)


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
        rows, padding = self.padded_vocab_size, self.padding
        if self.type in ("NullTokenizer", "NullMultimodalTokenizer"):
            why = "NullTokenizer has no tokens"
            return Vocabulary(origin, self.vocab_size, rows, padding, unreadable=why)
        path = self.files(saved_with_model)
        if path is None:
            why = f"vocabularies of {self.type} cannot be read"
            return Vocabulary(origin, None, rows, padding, unreadable=why)
        stored = vocabulary_of_files(path, origin=origin, rows=rows, padding=padding)
        if stored.ids is None:
            return stored
        ids = with_special_tokens(stored.ids, self.special_tokens)
        added = stored.added | set(self.special_tokens)
        return dataclasses.replace(stored, ids=ids, size=max(ids.values()) + 1, added=added)

    def files(self, saved_with_model: Path | None = None) -> Path | None:
        """The folder or file that ``vocabulary`` reads; None where there is none."""
        path = self._path()
        if (path is None or not path.exists()) and saved_with_model is not None:
            path = saved_with_model if saved_with_model.is_dir() else path
        return path

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
        cached = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def check_vocabulary(student: Vocabulary, teacher: Vocabulary, source: Source) -> Comparison:
    """Compare the two.

    Raises:
        RecipeError: an id stands for another text, the teacher lacks an ordinary token of the
            student's, or sizes differ where they are all that is known; the message shows the
            first tokens or the sizes that do.
    """
    if student.ids is not None and teacher.ids is not None:
        comparison = _compare_tokens(student, student.ids, teacher.ids, source)
        _check_rows(student, teacher, source, comparison.unknown)
        return comparison
    unread = [v for v in (student, teacher) if v.ids is None]
    why = "; ".join(dict.fromkeys(v.unreadable for v in unread if v.unreadable))
    ours, theirs = student.sizes(), teacher.sizes()
    if ours is None or theirs is None:
        return Comparison(f"not compared: {why or 'no size is known'}")
    if max(ours[0], theirs[0]) > min(ours[-1], theirs[-1]):
        raise source.error(
            f"has another vocabulary: {teacher.extent()} ({teacher.origin}) against the "
            f"student's {student.extent()} ({student.origin})",
            "use a teacher with the student's tokenizer",
        )
    _check_rows(student, teacher, source)
    return Comparison(f"sizes agree ({teacher.extent()}), tokens not compared: {why}")


def _check_rows(
    student: Vocabulary, teacher: Vocabulary, source: Source, unknown: Container[int] = ()
) -> None:
    """Every id of the student but those in ``unknown`` must have a row."""
    if student.size is None or teacher.rows is None:
        return
    if any(index not in unknown for index in range(teacher.rows, student.size)):
        raise source.error(
            f"has {teacher.rows} embedding rows for the student's {student.size} ids",
            "use a teacher with the student's tokenizer",
        )


def _compare_tokens(
    student: Vocabulary,
    student_ids: Mapping[str, int],
    teacher_ids: Mapping[str, int],
    source: Source,
) -> Comparison:
    ours, theirs = set(student_ids.items()), set(teacher_ids.items())
    used, known = set(student_ids.values()), set(teacher_ids.values())
    shared = {index for _, index in ours & theirs}
    clash = any(student_ids.get(token, index) != index for token, index in theirs)
    if clash or (used & known) - shared:
        _refuse(student_ids, teacher_ids, source, "has another tokenizer, {} ids differ")
    unknown = {index: token for token, index in ours if index not in known}
    ordinary = {token: index for index, token in unknown.items() if token not in student.added}
    if ordinary:
        _refuse(ordinary, {}, source, "lacks {} ordinary tokens of the student's")
    dropped = {index: token for token, index in theirs if index not in used}
    summary = f"the same {len(ours & theirs)} tokens as the student's"
    if dropped:
        summary += f"; {_some(dropped)} that the student lacks take no part"
    if unknown:
        summary += f"; it lacks {_some(unknown)} of the student's"
    return Comparison(summary, True, student.size, unknown, dropped)


def _refuse(
    student: Mapping[str, int], teacher: Mapping[str, int], source: Source, problem: str
) -> None:
    ids = sorted({index for _, index in set(student.items()) ^ set(teacher.items())})
    by_id = [
        {index: token for token, index in side.items() if index in ids[:_SHOWN]}
        for side in (student, teacher)
    ]
    examples = ", ".join(
        f"id {index} is {_quoted(by_id[0].get(index))} for the student "
        f"and {_quoted(by_id[1].get(index))} for the teacher"
        for index in ids[:_SHOWN]
    )
    raise source.error(
        f"{problem.format(len(ids))}: {examples}",
        "use a teacher with the student's tokenizer, or compare texts by align: chunks",
    )


def _some(tokens: Mapping[int, str]) -> str:
    """The number of tokens, and the first of them."""
    examples = ", ".join(f"{i} {tokens[i]!r}" for i in sorted(tokens)[:_SHOWN])
    more = ", ..." if len(tokens) > _SHOWN else ""
    return f"{len(tokens)} tokens ({examples}{more})"


def _quoted(token: str | None) -> str:
    return "nothing" if token is None else repr(token)
