"""The start of a teacher with another tokenizer: both tokenizers tried, the model loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch.distributed as dist

from megatron_moe_inject.data.packed import packing_flag
from megatron_moe_inject.host.errors import fail, listing
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext
from megatron_moe_inject.teachers.align.byte_tokenizer import ByteTokenizer, read_tokenizer
from megatron_moe_inject.teachers.align.reading import Reader
from megatron_moe_inject.teachers.align.scores import ModelScores
from megatron_moe_inject.teachers.align.step_teacher import AlignedTeacher
from megatron_moe_inject.teachers.base import Comparison, Source, TeacherInfo
from megatron_moe_inject.teachers.fp8 import LENGTH_MULTIPLE
from megatron_moe_inject.teachers.loading import load_teacher, states_dtype
from megatron_moe_inject.teachers.sources import SOURCES, Alignment, parse_source
from megatron_moe_inject.teachers.tokenizer_files import UnreadableTokenizer
from megatron_moe_inject.teachers.vocabulary import TokenizerFlags, Vocabulary


def check_aligned(
    name: str, source: str, flags: TokenizerFlags, prefix: str | list[int]
) -> TeacherInfo:
    """What can be known of the teacher without loading it; as ``loading.check_teacher``.

    Args:
        flags: the student's tokenizer flags.
        prefix: ``TeacherSpec.prefix``.

    Raises:
        RecipeError: as of ``check_teacher``, but for another vocabulary; a tokenizer of either side
            that gives no bytes back, or that does not belong to the model.
    """
    parsed = parse_source(name, source)
    student = _student_tokenizer(name, flags)
    unread = Vocabulary("", unreadable="texts are compared, not ids")
    info = SOURCES[parsed.kind].check(parsed, unread, prefix)
    teacher = _teacher_tokenizer(parsed)
    beyond = [i for i, p in enumerate(teacher.pieces[info.vocab_rows :]) if p is not None]
    if beyond:
        raise parsed.error(
            f"has {info.vocab_rows} embedding rows, and its tokenizer makes id "
            f"{info.vocab_rows + beyond[0]} of text",
            "its tokenizer files were replaced since it was trained",
        )
    told = f"its own tokenizer, {len(teacher.pieces)} ids; texts are aligned by their bytes"
    lacking = Reader(student, _with_rows(teacher, info.vocab_rows)).lacking
    if lacking:
        named = [f"{index} {lacking[index]!r}" for index in sorted(lacking)]
        told += f"; a text ends for it before {listing(named, 4)} of the student's"
    return dataclasses.replace(info, vocabulary=told, shared=Comparison(told), aligned=True)


def alignment() -> Alignment:
    """Of ``teachers.sources.ALIGNMENTS``."""
    return Alignment(check_aligned, aligned_teacher)


def aligned_teacher(
    run: RunContext, info: TeacherInfo, student: BuiltStudent, host_group: dist.ProcessGroup | None
) -> AlignedTeacher:
    """The teacher loaded beside the student's last chunk, with its own head whole; no collective.

    Args:
        info: of ``check_aligned``.
        host_group: the ranks of the tensor-parallel group over gloo; None for one rank.

    Raises:
        RecipeError: it cannot be loaded.
    """
    name, groups, args = info.name, student.groups, run.args
    spec, flags = run.recipe.teachers[name], TokenizerFlags.from_args(args)
    teacher = load_teacher(
        name,
        spec.source,
        params_dtype=states_dtype(spec.dtype, args.params_dtype),
        device=student.device,
        fp8=spec.fp8,
    )
    of_student, of_teacher = (
        _student_tokenizer(name, flags),
        _teacher_tokenizer(parse_source(name, spec.source)),
    )
    longest = info.max_positions
    if longest is not None:  # rows of a pass are filled up to such multiples
        longest -= longest % LENGTH_MULTIPLE
    masked = bool(args.reset_attention_mask) and packing_flag(args) is None
    return AlignedTeacher(
        name,
        Reader(of_student, _with_rows(of_teacher, info.vocab_rows), info.prefix, longest),
        ModelScores(
            teacher,
            groups.tp_cp if groups.tp_cp.size() > 1 else None,
            student.device,
            run.recipe.objective.row_kernels(),
        ),
        tp_group=groups.tp,
        host_group=host_group,
        cp_group=groups.cp,
        device=student.device,
        end=of_student.end if masked else None,
    )


def _with_rows(teacher: ByteTokenizer, rows: int) -> ByteTokenizer:
    """Without special tokens that the model has no row for."""
    specials = {name: index for name, index in teacher.specials.items() if index < rows}
    end, begin = (i if i is not None and i < rows else None for i in (teacher.end, teacher.begin))
    return dataclasses.replace(teacher, specials=specials, end=end, begin=begin)


def _student_tokenizer(name: str, flags: TokenizerFlags) -> ByteTokenizer:
    path = flags.files()
    try:
        if path is None:
            raise UnreadableTokenizer(f"{flags.type} names no files that can be read")
        return read_tokenizer(path, flags.special_tokens)
    except UnreadableTokenizer as error:
        raise fail(
            f"teachers.{name}.align", "chunks",
            f"needs the bytes of the student's tokens (--tokenizer-type {flags.type}): {error}",
            "use a byte-level tokenizer, or SentencePiece with byte fallback",
        ) from error  # fmt: skip


def _teacher_tokenizer(source: Source) -> ByteTokenizer:
    files = SOURCES[source.kind].tokenizer
    assert files is not None, "the rules of a recipe see to it"
    path: Path | None = files(source)
    try:
        if path is None:
            raise UnreadableTokenizer("it names no tokenizer files of this machine")
        tokenizer = read_tokenizer(path)
        tokenizer.check_exact()
    except UnreadableTokenizer as error:
        raise fail(
            f"teachers.{source.name}.align", "chunks",
            f"needs the bytes of the tokens of {source.text}: {error}",
            "take a teacher with a byte-level tokenizer, or SentencePiece with byte fallback",
        ) from error  # fmt: skip
    return tokenizer
