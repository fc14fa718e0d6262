"""``store:/dir`` as a kind of teacher: what its manifest says, and what it can teach.

A store runs no model. It is asked by the places of tokens in data sets (``data.token_places``),
which must be those that it was written from; ``rules.py`` says what a recipe may ask of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_moe_inject.teachers import vocabulary
from megatron_moe_inject.teachers.base import Source, TeacherInfo
from megatron_moe_inject.teachers.sources import OwnTokens, SourceKind
from megatron_moe_inject.teachers.store import chunk_teacher
from megatron_moe_inject.teachers.store.info import stored_info
from megatron_moe_inject.teachers.store.manifest import read_manifest
from megatron_moe_inject.teachers.store.step_teacher import stored_teacher


def source_kind() -> SourceKind:
    """Of ``teachers.sources.SOURCES``."""
    return SourceKind(
        "store:/dir",
        check,
        in_step=stored_teacher,
        aligned=OwnTokens(chunk_teacher.check_stored, chunk_teacher.stored_teacher),
    )


def check(
    source: Source, student: vocabulary.Vocabulary, prefix: str | Sequence[int]
) -> TeacherInfo:
    """What the manifest says; see ``teachers.check_teacher``."""
    return stored_info(source, student, prefix, read_manifest(source.path, source.error))
