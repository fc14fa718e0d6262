"""What the manifest of a store says of its teacher, as ``TeacherInfo``."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.teachers import vocabulary
from megatron_moe_inject.teachers.base import Source, TeacherInfo
from megatron_moe_inject.teachers.store.manifest import TOKENIZER, Manifest


def stored_info(
    source: Source,
    student: vocabulary.Vocabulary,
    prefix: str | Sequence[int],
    manifest: Manifest,
) -> TeacherInfo:
    """What can be known without a run; see ``teachers.check_teacher``.

    Args:
        manifest: of the store.

    Raises:
        RecipeError: a prefix, or another tokenizer than it was written with.
    """
    if prefix != "auto":
        raise fail(
            f"teachers.{source.name}.prefix", prefix,
            "cannot be put in front of what a store was written from", "write it with that prefix",
        )  # fmt: skip
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
            "chunks": plan.chunks is not None,
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
