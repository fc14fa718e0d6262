"""What ``moe-inject store-teacher`` needs to write chunks of text: tokenizers, a context and a
precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_moe_inject.host.errors import RecipeError, fail
from megatron_moe_inject.recipe.schema import TeacherSpec
from megatron_moe_inject.teachers.align.reading import Reader
from megatron_moe_inject.teachers.align.start import (
    student_tokenizer,
    teacher_tokenizer,
    tokenizer_path,
    with_rows,
)
from megatron_moe_inject.teachers.base import TeacherInfo
from megatron_moe_inject.teachers.fp8 import LENGTH_MULTIPLE
from megatron_moe_inject.teachers.sources import parse_source
from megatron_moe_inject.teachers.store.chunk_format import PRECISIONS
from megatron_moe_inject.teachers.vocabulary import TokenizerFlags

_USUAL_CONTEXT = 2
"""Tokens of the teacher for each of ``--seq-length``, where its positions reach so far."""


@dataclass(frozen=True)
class WrittenChunks:
    """Of one teacher.

    Attributes:
        reader: makes what it reads of documents.
        tokenizer: folder or file of its tokenizer.
        ids: of that.
        context: its tokens that it reads at once, of one document, behind its prefix.
        log_probs: precision of what is kept.
    """

    reader: Reader
    tokenizer: Path
    ids: int
    context: int
    log_probs: str


def document_reader(
    name: str, spec: TeacherSpec, info: TeacherInfo, flags: TokenizerFlags
) -> Reader:
    """What reads whole documents as a teacher does."""
    source = parse_source(name, spec.source)
    teacher = teacher_tokenizer(source, tokenizer_path(source, spec))
    return Reader(student_tokenizer(name, flags), with_rows(teacher, info.vocab_rows), info.prefix)


def written_chunks(
    name: str,
    spec: TeacherSpec,
    info: TeacherInfo,
    flags: TokenizerFlags,
    *,
    context: int | None,
    log_probs: str | None,
    length: int | None,
) -> WrittenChunks:
    """What is to be written of a teacher.

    Args:
        info: of ``check_aligned``.
        flags: the student's tokenizer.
        context: ``--context``; None for twice ``--seq-length``, or as far as its positions reach.
        log_probs: ``--log-probs``; None for the first of ``PRECISIONS``.
        length: ``--seq-length``; None where it was not given.

    Raises:
        RecipeError: what cannot be.
    """
    if log_probs not in (None, *PRECISIONS):
        raise fail(
            "--log-probs", log_probs, f"is of ids, and teachers.{name} has align: chunks",
            f"write {' or '.join(PRECISIONS)}",
        )  # fmt: skip
    if context is None and length is None:
        raise RecipeError("--context: missing; say how many tokens the teacher reads at once")
    limit = None
    if info.max_positions is not None:
        limit = info.max_positions - info.max_positions % LENGTH_MULTIPLE - len(info.prefix)
    if context is None:
        assert length is not None, "seen above"
        context = _USUAL_CONTEXT * length if limit is None else min(_USUAL_CONTEXT * length, limit)
    elif limit is not None and context > limit:
        raise fail(
            "--context", context,
            f"is of the teacher's tokens, and its positions reach {limit} behind its prefix",
            "write no more than that",
        )  # fmt: skip
    source = parse_source(name, spec.source)
    path = tokenizer_path(source, spec)
    ids = len(teacher_tokenizer(source, path).pieces)
    assert path is not None, "a tokenizer was read there"
    reader = document_reader(name, spec, info, flags)
    return WrittenChunks(reader, path, ids, context, log_probs or PRECISIONS[0])
