"""The start of a teacher with another tokenizer: both tokenizers tried, the model loaded.

A kind that runs no model has its own check and its own teacher of a step (``sources.OwnTokens``),
made of what stands here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch.distributed as dist

from megatron_moe_inject.data.packed import packing_flag
from megatron_moe_inject.host.errors import fail, listing
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext
from megatron_moe_inject.recipe.schema import TeacherSpec
from megatron_moe_inject.teachers.align.byte_tokenizer import ByteTokenizer, read_tokenizer
from megatron_moe_inject.teachers.align.reading import Reader
from megatron_moe_inject.teachers.align.samples import SampleReader
from megatron_moe_inject.teachers.align.scores import ModelScores
from megatron_moe_inject.teachers.align.step_teacher import AlignedTeacher
from megatron_moe_inject.teachers.base import Comparison, Source, TeacherInfo
from megatron_moe_inject.teachers.expert_parallel import ExpertGroups
from megatron_moe_inject.teachers.fp8 import LENGTH_MULTIPLE
from megatron_moe_inject.teachers.loading import load_teacher, states_dtype
from megatron_moe_inject.teachers.sources import SOURCES, Alignment, parse_source
from megatron_moe_inject.teachers.step_pass import StepTeacher
from megatron_moe_inject.teachers.tokenizer_files import UnreadableTokenizer
from megatron_moe_inject.teachers.vocabulary import TokenizerFlags, Vocabulary


def check_aligned(name: str, spec: TeacherSpec, flags: TokenizerFlags) -> TeacherInfo:
    """What can be known of the teacher without loading it; as ``loading.check_teacher``.

    Args:
        spec: of the recipe.
        flags: the student's tokenizer flags.

    Raises:
        RecipeError: as of ``check_teacher``, but for another vocabulary; a tokenizer of either side
            that gives no bytes back, or that does not belong to the model.
    """
    own = SOURCES[spec.kind].aligned
    if own is not None:
        return own.check(name, spec, flags)
    parsed = parse_source(name, spec.source)
    student = student_tokenizer(name, flags)
    unread = Vocabulary("", unreadable="texts are compared, not ids")
    info = SOURCES[parsed.kind].check(parsed, unread, spec.prefix)
    teacher = teacher_tokenizer(parsed, tokenizer_path(parsed, spec))
    beyond = [i for i, p in enumerate(teacher.pieces[info.vocab_rows :]) if p is not None]
    if beyond:
        raise parsed.error(
            f"has {info.vocab_rows} embedding rows, and its tokenizer makes id "
            f"{info.vocab_rows + beyond[0]} of text",
            "its tokenizer files were replaced since it was trained",
        )
    told = told_of(student, teacher, info.vocab_rows)
    return dataclasses.replace(info, vocabulary=told, shared=Comparison(told), aligned=True)


def told_of(student: ByteTokenizer, teacher: ByteTokenizer, rows: int) -> str:
    """``TeacherInfo.vocabulary`` of a teacher with so many rows of its own."""
    told = f"its own tokenizer, {len(teacher.pieces)} ids; texts are aligned by their bytes"
    lacking = Reader(student, with_rows(teacher, rows)).lacking
    if lacking:
        named = [f"{index} {lacking[index]!r}" for index in sorted(lacking)]
        told += f"; a text ends for it before {listing(named, 4)} of the student's"
    return told


def alignment() -> Alignment:
    """Of ``teachers.sources.ALIGNMENTS``."""
    return Alignment(check_aligned, aligned_teacher)


def aligned_teacher(
    run: RunContext, info: TeacherInfo, student: BuiltStudent, host_group: dist.ProcessGroup | None
) -> StepTeacher:
    """The teacher loaded beside the student's last chunk, with its own head whole, or what stands
    in a model's place; no collective, but those of ``load_teacher`` with ``experts``.

    Args:
        info: of ``check_aligned``.
        host_group: the ranks of the tensor-parallel group over gloo; None for one rank.

    Raises:
        RecipeError: it cannot be loaded.
    """
    own = SOURCES[info.kind].aligned
    if own is not None:
        return own.in_step(run, info, student, host_group)
    name, groups, args = info.name, student.groups, run.args
    spec = run.recipe.teachers[name]
    teacher = load_teacher(
        name,
        spec.source,
        params_dtype=states_dtype(spec.dtype, args.params_dtype),
        device=student.device,
        fp8=spec.fp8,
        experts=run.need(ExpertGroups).of(spec),
    )
    source = parse_source(name, spec.source)
    longest = info.max_positions
    if longest is not None:  # rows of a pass are filled up to such multiples
        longest -= longest % LENGTH_MULTIPLE
    return AlignedTeacher(
        name,
        sample_reader(run, info, teacher_tokenizer(source, tokenizer_path(source, spec)), longest),
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
    )


def sample_reader(
    run: RunContext, info: TeacherInfo, teacher: ByteTokenizer, longest: int | None
) -> SampleReader:
    """What reads a run's samples as a teacher does.

    Args:
        info: of ``check_aligned``.
        teacher: its tokenizer.
        longest: see ``Reader``.
    """
    args = run.args
    student = student_tokenizer(info.name, TokenizerFlags.from_args(args))
    masked = bool(args.reset_attention_mask) and packing_flag(args) is None
    return SampleReader(
        Reader(student, with_rows(teacher, info.vocab_rows), info.prefix, longest),
        student.end if masked else None,
    )


def with_rows(teacher: ByteTokenizer, rows: int) -> ByteTokenizer:
    """Without special tokens that the model has no row for."""
    specials = {name: index for name, index in teacher.specials.items() if index < rows}
    end, begin = (i if i is not None and i < rows else None for i in (teacher.end, teacher.begin))
    return dataclasses.replace(teacher, specials=specials, end=end, begin=begin)


def student_tokenizer(name: str, flags: TokenizerFlags) -> ByteTokenizer:
    """The student's, for a teacher of that name.

    Raises:
        RecipeError: it gives no bytes back.
    """
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


def tokenizer_path(source: Source, spec: TeacherSpec) -> Path | None:
    """Folder or file of a teacher's tokenizer: that of a model that runs here, or that the recipe
    names for servers; None where there is none."""
    if spec.server.tokenizer is not None:
        return Path(spec.server.tokenizer).expanduser()
    files = SOURCES[source.kind].tokenizer
    assert files is not None, "the rules of a recipe see to it"
    path: Path | None = files(source)
    return path


def teacher_tokenizer(source: Source, path: Path | None) -> ByteTokenizer:
    """A teacher's, of a folder or file.

    Raises:
        RecipeError: it gives no bytes back.
    """
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
