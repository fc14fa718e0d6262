"""``store:/dir`` as a kind of teacher: what its manifest says, and what it can teach.

A store runs no model. It is asked by the places of tokens in data sets (``data.token_places``),
which must be those that it was written from; ``rules.py`` says what a recipe may ask of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.teachers import vocabulary
from megatron_moe_inject.teachers.base import Source, TeacherInfo
from megatron_moe_inject.teachers.sources import SourceKind
from megatron_moe_inject.teachers.store.manifest import (
    TOKENIZER,
    read_manifest,
)
from megatron_moe_inject.teachers.store.step_teacher import stored_teacher


def source_kind() -> SourceKind:
    """Of ``teachers.sources.SOURCES``."""
    return SourceKind("store:/dir", check, in_step=stored_teacher)


def check(
    source: Source, student: vocabulary.Vocabulary, prefix: str | Sequence[int]
) -> TeacherInfo:
    """What the manifest says; see ``teachers.check_teacher``."""
    if prefix != "auto":
        raise fail(
            f"teachers.{source.name}.prefix", prefix,
            "cannot be put in front of what a store was written from", "write it with that prefix",
        )  # fmt: skip
    manifest = read_manifest(source.path, source.error)
    plan = manifest.plan
    own = vocabulary.Vocabulary(
        source.text, plan.vocab_size, unreadable="the store has no tokenizer"
    )
    if plan.tokenizer:
        own = vocabulary.vocabulary_of_files(source.path / TOKENIZER, origin=source.text, rows=None)
    shared = vocabulary.check_vocabulary(student, own, source)
    if shared.dropped:
        raise source.error(
            f"may say something about tokens that the student lacks ({shared.told})",
            "write it with the student's tokenizer flags",
        )
    return TeacherInfo(
        name=source.name,
        source=source.text,
        kind=source.kind,
        path=str(source.path),
        architecture=f"a store of {plan.teacher.architecture}",
        num_layers=0,
        hidden_size=0 if plan.states is None else plan.states.hidden_size,
        vocab_rows=plan.vocab_size,
        vocab_size=plan.vocab_size,
        parameters=0,
        max_positions=None,
        vocabulary=shared.told,
        config={
            "identity": plan.identity,
            "states": None if plan.states is None else plan.states.hidden_size,
            "slots": plan.slots,
            "mass": plan.mass,
            "log_probs": plan.log_probs,
            "temperatures": list(plan.temperatures),
            "rows": manifest.rows,
            "bytes": manifest.bytes,
        },
        shared=shared,
        prefix_told="as the store was written",
    )
