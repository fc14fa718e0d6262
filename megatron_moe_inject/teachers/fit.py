"""The teachers of a run: checked before anything is built, loaded beside a built student."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence

import torch

from megatron_moe_inject.data.packed import packing_flag
from megatron_moe_inject.host.errors import (
    RecipeError,
    fail,
    listing,
)
from megatron_moe_inject.host.labels import PREFERENCE
from megatron_moe_inject.host.megatron_types import Chunk, Groups
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.teachers.base import Teacher, TeacherInfo
from megatron_moe_inject.teachers.expert_parallel import ExpertRanks, check_experts
from megatron_moe_inject.teachers.loading import (
    StudentTokenizer,
    check_teacher,
    load_teacher,
    states_dtype,
)
from megatron_moe_inject.teachers.occurrences import occurrences
from megatron_moe_inject.teachers.pipeline import Helper, Pipeline, SpreadTeacher
from megatron_moe_inject.teachers.prefix import words
from megatron_moe_inject.teachers.sources import ALIGNMENTS
from megatron_moe_inject.teachers.step_pass import (
    CommitteePass,
    DomainTeacher,
    StepTeacher,
    TeacherPass,
)


def checked_teachers(recipe: Recipe, args: Namespace) -> dict[str, TeacherInfo]:
    """What the teachers' files say, by name; no collective and no weights.

    Raises:
        RecipeError: a source, tokenizer or length that does not fit the student.
    """
    tokenizer = StudentTokenizer.from_args(args)
    infos = {}
    for name, spec in recipe.teachers.items():
        if spec.aligned:
            kind = ALIGNMENTS[spec.align]
            infos[name] = kind.check(name, spec, tokenizer)
            continue
        infos[name] = check_teacher(
            name, spec.source, student_tokenizer=tokenizer, prefix=spec.prefix
        )
    check_fit(recipe, infos, args.seq_length)
    check_experts(recipe, infos)
    return infos


def check_fit(recipe: Recipe, infos: Mapping[str, TeacherInfo], length: int | None) -> None:
    """Refuse teachers that cannot read sequences of this length, or that the objective cannot use.

    Raises:
        RecipeError: positions that do not reach, or a divergence without a finite value.
    """
    for name, info in infos.items():
        if length is not None and not info.aligned:
            _check_length(name, info, length)
        _check_divergence(recipe, name, info)


def _check_length(name: str, info: TeacherInfo, length: int) -> None:
    """Learned positions must reach as far as the prefix and the text."""
    if info.max_positions is None or length + len(info.prefix) <= info.max_positions:
        return
    limit = f"{info.source} has positions up to {info.max_positions}, but --seq-length is {length}"
    if length > info.max_positions:
        raise RecipeError(
            f"teachers.{name}.source: {limit}; use a teacher with longer positions or shorter "
            "sequences"
        )
    key = f"teachers.{name}.prefix"
    raise RecipeError(
        f"{key}: {limit} and ids {list(info.prefix)} stand in front; write prefix: none, or use "
        "shorter sequences",
        key,
    )


def _check_divergence(recipe: Recipe, name: str, info: TeacherInfo) -> None:
    """Reverse KL is infinite where the teacher gives an id of the student's no probability."""
    if recipe.objective.divergence != "reverse_kl" or not excluded_ids(info):
        return
    ids = sorted(excluded_ids(info))
    raise fail(
        "objective.divergence", "reverse_kl",
        f"is infinite where a teacher gives no probability, and teacher {name} has no "
        f"{listing(ids, 4)} of the student's ids",
        "use forward_kl, jsd or skew_kl, or a teacher with the student's tokenizer",
    )  # fmt: skip


def excluded_ids(info: TeacherInfo) -> set[int]:
    """Ids of the student's tokenizer, or within their range, that mean nothing to a teacher or
    something else than to the student."""
    size = info.shared.student_size
    return {i for i in (*info.shared.unknown, *info.shared.dropped) if size is None or i < size}


def remarks(
    infos: Mapping[str, TeacherInfo], length: int | None, texts: Mapping[str, Sequence[str]]
) -> list[str]:
    """What a plan says of the teachers besides their sizes, a line each; no collective.

    Args:
        length: ``--seq-length``.
        texts: path prefixes of the training text that each teacher reads; tokens that it lacks are
            counted there.
    """
    lines = []
    for name, info in infos.items():
        if "not compared" in info.vocabulary:
            lines.append(f"teacher {name}: {info.vocabulary}")
        if info.shared.dropped or info.shared.unknown or info.aligned:
            lines.append(f"teacher {name} has {info.vocabulary}")
        if info.shared.unknown:
            frequency = occurrences(texts.get(name, ()), info.shared.unknown)
            lines.append(f"teacher {name}: nothing is taught from such a token on; {frequency}")
        if info.prefix or info.prefix_told.startswith("its "):
            lines.append(f"teacher {name} {words(info.prefix, info.prefix_told)}")
        reads = (length or 0) + len(info.prefix)
        if info.trained_positions is not None and reads > info.trained_positions:
            lines.append(
                f"teacher {name} has rotary positions for {info.trained_positions} tokens and "
                f"reads {reads}: it may predict badly beyond the first {info.trained_positions}"
            )
    return lines


def loaded_teacher(
    recipe: Recipe,
    info: TeacherInfo,
    args: Namespace,
    params_dtype: torch.dtype,
    device: torch.device,
    experts: ExpertRanks | None = None,
) -> Teacher:
    """Load a teacher on this rank; no collective, but those of ``load_teacher`` with ``experts``.

    Args:
        info: of ``checked_teachers``.
        params_dtype: type of the student's parameters.
        device: where they are.
        experts: the ranks that hold its experts together.

    Raises:
        RecipeError: it cannot be loaded.
    """
    spec = recipe.teachers[info.name]
    return load_teacher(
        info.name,
        spec.source,
        params_dtype=states_dtype(spec.dtype, params_dtype),
        device=device,
        resets_documents=reads_masks(args),
        fp8=spec.fp8,
        prefix=info.prefix,
        experts=experts,
    )


def reads_masks(args: Namespace) -> bool:
    """Whether teachers must see the positions and masks of the batch, which begin anew at each
    document; packed documents go through a teacher by themselves."""
    return packing_flag(args) is None and (args.reset_position_ids or args.reset_attention_mask)


def teacher_pass(
    recipe: Recipe,
    info: TeacherInfo,
    args: Namespace,
    chunk: Chunk,
    groups: Groups,
    *,
    valid_vocab_size: int,
    layers_of: Callable[[Teacher], Sequence[int]] = lambda teacher: (),
    pipeline: Pipeline | None = None,
    experts: ExpertRanks | None = None,
) -> TeacherPass:
    """Load a teacher beside the student's chunk with the output layer; no collective, but those of
    ``load_teacher`` with ``experts``.

    Args:
        info: of ``checked_teachers``.
        layers_of: the teacher's layers whose states are wanted besides.
        pipeline: where all stages run it.
        experts: the ranks that hold its experts together.

    Raises:
        RecipeError: it cannot be loaded, or knows fewer tokens than the student's tokenizer.
    """
    name, spec = info.name, recipe.teachers[info.name]
    head_weight = chunk.shared_embedding_or_output_weight()  # for its type, place and rows
    teacher = loaded_teacher(recipe, info, args, head_weight.dtype, head_weight.device, experts)
    if teacher.vocab_size < valid_vocab_size and not info.shared.by_token:
        raise RecipeError(
            f"teachers.{name}.source: {spec.source} knows {teacher.vocab_size} tokens, but the "
            f"student's tokenizer has {valid_vocab_size}; use a teacher that was trained "
            "with the student's tokenizer"
        )
    rows = head_weight.shape[0]
    start = groups.tp.rank() * rows
    excluded = excluded_ids(info) | set(range(teacher.vocab_size, valid_vocab_size))
    stop = min(start + rows, valid_vocab_size)
    columns = sorted(i - start for i in excluded if start <= i < stop)
    transform = teacher.logit_transform
    if columns:
        excluded_columns = torch.tensor(columns, device=head_weight.device)
        transform = dataclasses.replace(transform, excluded=excluded_columns)
    return TeacherPass(
        teacher,
        teacher.head_weight(start, start + rows),
        tp_group=groups.tp,
        cp_group=groups.cp,
        share_group=groups.tp_cp,
        window=spec.window,
        layers=layers_of(teacher),
        resets_documents=reads_masks(args),
        transform=transform,
        unknown=sorted(info.shared.unknown),
        pipeline=pipeline,
    )


def helper(
    recipe: Recipe,
    info: TeacherInfo,
    args: Namespace,
    device: torch.device,
    *,
    layers_of: Callable[[Teacher], Sequence[int]],
    experts: ExpertRanks | None = None,
) -> Helper:
    """Load a teacher on a stage that helps the last one. Arguments, collectives and errors as of
    ``teacher_pass``."""
    teacher = loaded_teacher(recipe, info, args, args.params_dtype, device, experts)
    window = recipe.teachers[info.name].window
    spread = SpreadTeacher(teacher, layers_of(teacher), reads_masks(args), window)
    return Helper(spread, taught_domains(recipe)[info.name])


def taught_domains(recipe: Recipe) -> dict[str, list[int]]:
    """Labels of what each teacher reads, in the order in which teachers run: indices of the domains
    that it teaches, and ``PREFERENCE`` of the reference of pairs."""
    taught: dict[str, list[int]] = {}
    for index, domain in enumerate(recipe.domains):
        for name in domain.teacher_weights:
            taught.setdefault(name, []).append(index)
    if (reference := recipe.reference_teacher()) is not None:
        taught.setdefault(reference, []).append(PREFERENCE)
    return taught


def by_domain(recipe: Recipe, passes: Mapping[str, StepTeacher]) -> dict[int, DomainTeacher]:
    """The teacher or teachers of each domain that has one, by its index."""
    teachers: dict[int, DomainTeacher] = {}
    for index, domain in enumerate(recipe.domains):
        weights = domain.teacher_weights
        members = tuple(passes[name] for name in weights)
        if len(members) > 1:
            teachers[index] = CommitteePass(members, tuple(weights.values()), domain.committee)
        elif members:
            teachers[index] = members[0]
    return teachers
