"""``server:URL`` as a kind of teacher.

What is behind the URLs is not asked here, where every rank comes: the first rank asks once for all
before the student is built (``part``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.teachers.base import Comparison, Source, TeacherInfo
from megatron_moe_inject.teachers.served.chunk_rows import ServedChunkStore
from megatron_moe_inject.teachers.served.chunks import check_served
from megatron_moe_inject.teachers.served.chunks import served_teacher as served_chunks
from megatron_moe_inject.teachers.served.step_teacher import served_teacher
from megatron_moe_inject.teachers.served.store_rows import ServedStore
from megatron_moe_inject.teachers.sources import EXAMPLES, OwnTokens, SourceKind
from megatron_moe_inject.teachers.vocabulary import Vocabulary


def source_kind() -> SourceKind:
    """Of ``teachers.sources.SOURCES``."""
    return SourceKind(
        EXAMPLES["server"],
        check,
        is_folder=False,
        in_step=served_teacher,
        for_store=ServedStore,
        aligned=OwnTokens(check_served, served_chunks, ServedChunkStore),
    )


def check(source: Source, student: Vocabulary, prefix: str | Sequence[int]) -> TeacherInfo:
    """What can be said before anything is asked; see ``teachers.check_teacher``."""
    if prefix != "auto":
        raise fail(
            f"teachers.{source.name}.prefix", prefix, "cannot be put in front of what a server "
            "reads", "remove it: it reads what the student reads",
        )  # fmt: skip
    size = student.size or student.rows or 0
    told = "compared when its servers are asked"
    where = source.text.partition(":")[2]
    return TeacherInfo(
        name=source.name,
        source=source.text,
        kind=source.kind,
        path=str(Path()),
        architecture=f"served at {where}",
        num_layers=0,
        hidden_size=0,
        vocab_rows=size,
        vocab_size=size,
        parameters=0,
        max_positions=None,
        vocabulary=told,
        shared=Comparison(told, student_size=student.size),
        prefix_told="as the student reads",
    )
