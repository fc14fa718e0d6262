"""A teacher of any kind: checked without its weights, loaded beside the student."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_moe_inject.teachers.base import Teacher, TeacherInfo
from megatron_moe_inject.teachers.expert_parallel import ExpertRanks
from megatron_moe_inject.teachers.fp8 import LENGTH_MULTIPLE as FP8_LENGTH
from megatron_moe_inject.teachers.prefix import PrefixedTeacher
from megatron_moe_inject.teachers.sources import SOURCES, parse_source
from megatron_moe_inject.teachers.vocabulary import TokenizerFlags as StudentTokenizer

__all__ = [
    "StudentTokenizer",
    "Teacher",
    "TeacherInfo",
    "check_teacher",
    "load_teacher",
    "states_dtype",
]


def states_dtype(written: str, params_dtype: torch.dtype) -> torch.dtype:
    """Type of a teacher's parameters and states.

    Args:
        written: ``TeacherSpec.dtype``.
        params_dtype: the student's.
    """
    return {"params": params_dtype, "fp32": torch.float32, "bf16": torch.bfloat16}[written]


def check_teacher(
    name: str,
    source: str,
    *,
    student_tokenizer: StudentTokenizer,
    prefix: str | Sequence[int] = "auto",
) -> TeacherInfo:
    """What can be known of a teacher without loading it; cheap, every rank may call it.

    Args:
        name: its key in the recipe.
        source: ``megatron:/dir`` (a ``--save`` directory or one of its iterations),
            ``hf:/dir``, or of another kind of ``sources.SOURCES``.
        student_tokenizer: the student's tokenizer flags.
        prefix: ``TeacherSpec.prefix``.

    Raises:
        RecipeError: no such source, an incomplete or unsupported model, another vocabulary, a
            prefix that it does not have.

    No collective, no random numbers, no weights read.
    """
    parsed = parse_source(name, source)
    return SOURCES[parsed.kind].check(parsed, student_tokenizer.vocabulary(), prefix)


def load_teacher(
    name: str,
    source: str,
    *,
    params_dtype: torch.dtype,
    device: torch.device | str,
    resets_documents: bool = False,
    fp8: str = "none",
    prefix: Sequence[int] = (),
    experts: ExpertRanks | None = None,
) -> Teacher:
    """Load a whole teacher on this rank, outside every module of the student.

    Args:
        name: its key in the recipe.
        source: as in ``check_teacher``.
        params_dtype: type of its parameters and activations.
        device: where it lives.
        resets_documents: whether it will be given positions and masks that start anew at each
            document; not every Hugging Face architecture takes them.
        fp8: ``TeacherSpec.fp8``, for ``megatron:`` teachers.
        prefix: ids that it reads in front of every text, ``TeacherInfo.prefix``.
        experts: the ranks that hold its experts together, for ``megatron:`` teachers; None holds
            all here.

    Raises:
        RecipeError: it cannot be read, does not hold every weight, cannot take what
            ``resets_documents`` promises, or its logits are more than ``head @ hidden``.

    No collective without ``experts``: any subset of ranks may call it. Random number generators
    (torch's and Megatron's tracker) are as before.
    """
    parsed = parse_source(name, source)
    load = SOURCES[parsed.kind].load
    assert load is not None, f"a {parsed.kind}: runs no model"
    teacher = load(
        parsed,
        params_dtype=params_dtype,
        device=torch.device(device),
        resets_documents=resets_documents,
        fp8=fp8,
        **({} if experts is None else {"experts": experts}),
    )
    if not prefix:
        return teacher
    return PrefixedTeacher(teacher, prefix, multiple=1 if fp8 == "none" else FP8_LENGTH)
