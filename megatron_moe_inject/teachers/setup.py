"""The teachers of a run: checked before anything is built, loaded beside a built student."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from megatron_moe_inject.recipe import Recipe, RecipeError
from megatron_moe_inject.teachers import (
    StudentTokenizer,
    check_teacher,
    load_teacher,
    states_dtype,
)
from megatron_moe_inject.teachers.base import Teacher, TeacherInfo
from megatron_moe_inject.teachers.step_pass import CommitteePass, TeacherPass


def checked_teachers(recipe: Recipe, args: Namespace) -> dict[str, TeacherInfo]:
    """What the teachers' files say, by name; no collective and no weights.

    Raises:
        RecipeError: a source, tokenizer or length that does not fit the student.
    """
    tokenizer = StudentTokenizer.from_args(args)
    infos = {
        name: check_teacher(name, spec.source, student_tokenizer=tokenizer)
        for name, spec in recipe.teachers.items()
    }
    for name, info in infos.items():
        if info.max_positions is not None and args.seq_length > info.max_positions:
            raise RecipeError(
                f"teachers.{name}.source: {info.source} has positions up to "
                f"{info.max_positions}, but --seq-length is {args.seq_length}; use a teacher "
                "with longer positions or shorter sequences"
            )
    return infos


def teacher_pass(
    recipe: Recipe,
    name: str,
    args: Namespace,
    chunk: torch.nn.Module,
    groups: Any,
    *,
    valid_vocab_size: int,
    layers_of: Callable[[Teacher], Sequence[int]] = lambda teacher: (),
) -> TeacherPass:
    """Load a teacher beside the student's chunk with the output layer; no collective.

    Args:
        layers_of: the teacher's layers whose states are wanted besides.

    Raises:
        RecipeError: it cannot be loaded, or knows fewer tokens than the student's tokenizer.
    """
    spec = recipe.teachers[name]
    head_weight = chunk.shared_embedding_or_output_weight()  # for its type, place and rows
    resets = args.reset_position_ids or args.reset_attention_mask
    teacher = load_teacher(
        name,
        spec.source,
        params_dtype=states_dtype(spec.dtype, head_weight.dtype),
        device=head_weight.device,
        resets_documents=resets,
        fp8=spec.fp8,
    )
    if teacher.vocab_size < valid_vocab_size:
        raise RecipeError(
            f"teachers.{name}.source: {spec.source} knows {teacher.vocab_size} tokens, but the "
            f"student's tokenizer has {valid_vocab_size}; use a teacher that was trained "
            "with the student's tokenizer"
        )
    rows = head_weight.shape[0]
    start = groups.tp.rank() * rows
    return TeacherPass(
        teacher,
        teacher.head_weight(start, start + rows),
        tp_group=groups.tp,
        cp_group=groups.cp,
        share_group=groups.tp_cp,
        window=spec.window,
        layers=layers_of(teacher),
        resets_documents=resets,
    )


def by_domain(
    recipe: Recipe, passes: Mapping[str, TeacherPass]
) -> dict[int, TeacherPass | CommitteePass]:
    """The teacher or teachers of each domain that has one, by its index."""
    found = {}
    for index, domain in enumerate(recipe.domains):
        weights = domain.teacher_weights
        own = tuple(passes[name] for name in weights)
        if len(own) > 1:
            found[index] = CommitteePass(own, tuple(weights.values()), domain.committee)
        elif own:
            found[index] = own[0]
    return found
