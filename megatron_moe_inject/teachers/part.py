"""The teachers of a run: looked at before anything is built, loaded beside the built student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from megatron_moe_inject.data.packed import (
    check_packed,
    check_whole_documents,
    packing_flag,
)
from megatron_moe_inject.host.agreement import agree
from megatron_moe_inject.host.finite import FiniteWatch
from megatron_moe_inject.host.megatron_types import Chunk, Groups
from megatron_moe_inject.host.step import StepPart
from megatron_moe_inject.host.text import count, memory_text, table
from megatron_moe_inject.recipe.run_kinds import INJECTION
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext, RunPart
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.teachers.base import TeacherInfo
from megatron_moe_inject.teachers.fit import (
    by_domain,
    checked_teachers,
    remarks,
    teacher_pass,
)
from megatron_moe_inject.teachers.loading import states_dtype
from megatron_moe_inject.teachers.step_teachers import ComparesPrefix, OriginalTeacher, StepTeachers


@dataclass(frozen=True)
class TeacherInfos:
    """What the teachers' files say, by name."""

    by_name: Mapping[str, TeacherInfo]


class TeachersPart(RunPart):
    """Provides ``TeacherInfos``, and once attached ``StepTeachers``."""

    def __init__(self, run: RunContext) -> None:
        if run.recipe.teachers:
            check_packed(run.args, run.largest_micro_batch, "a teacher")
            check_whole_documents(run.args, "a teacher")
        self._run = run
        self._infos = checked_teachers(run.recipe, run.args)
        run.provide(TeacherInfos, TeacherInfos(self._infos))

    def describe(self) -> dict[str, Any]:
        """All ranks must have found the same teachers."""
        return {
            f"teachers.{name}.source ({field})": value
            for name, info in self._infos.items()
            for field, value in asdict(info).items()
        }

    def attach(self, student: BuiltStudent) -> StepPart | None:
        """Load them on the last stage.

        Collectives: those of ``agree``.

        Raises:
            RecipeError: on every rank: one cannot be loaded.
        """
        run, last = self._run, student.last
        taught = agree(lambda: {} if last is None else self._taught(last, student.groups))
        watch = run.get(FiniteWatch)
        compares = run.get(ComparesPrefix)
        original = run.get(OriginalTeacher)
        teachers = StepTeachers(
            taught,
            original,
            valid_vocab_size=run.valid_vocab_size,
            kernels=run.recipe.objective.row_kernels(),
            see=(lambda name, states: None) if watch is None else watch.see,
            compares_prefix=lambda: compares is not None and compares.compares_prefix,
            packed=bool(run.recipe.teachers) and packing_flag(run.args) is not None,
        )
        run.provide(StepTeachers, teachers)
        if run.kind == INJECTION:
            texts = {} if dist.get_rank() else texts_by_teacher(run)
            run.warnings += remarks(self._infos, run.args.seq_length, texts)
        return teachers

    def plan_lines(self, given: Mapping[str, list[str]]) -> Mapping[str, list[str]]:
        """With sizes and places."""
        dtype = self._run.args.params_dtype
        rows = {
            name: (
                f"{info.kind}: {info.num_layers} layers, hidden {info.hidden_size}",
                count(info.parameters),
                memory_text(
                    info.parameters
                    * states_dtype(self._run.recipe.teachers[name].dtype, dtype).itemsize
                ),
                "every rank of the last stage",
            )
            for name, info in self._infos.items()
        }
        return teacher_lines(self._run.recipe, rows)

    def _taught(self, chunk: Chunk, groups: Groups) -> dict[int, Any]:
        """The teachers of the domains, loaded beside the student's last chunk."""
        run = self._run

        def layers_of(teacher: Any) -> Sequence[int]:
            return sorted({layer for part in run.parts for layer in part.teacher_layers(teacher)})

        passes = {
            name: teacher_pass(
                run.recipe,
                info,
                run.args,
                chunk,
                groups,
                valid_vocab_size=run.valid_vocab_size,
                layers_of=layers_of,
            )
            for name, info in self._infos.items()
        }
        return by_domain(run.recipe, passes)


def teacher_lines(recipe: Recipe, rows: Mapping[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """The plan's table of teachers.

    Args:
        rows: kind, parameters, and where known memory and places of each teacher.
    """
    if not rows:
        return {}
    header = ("teacher", "source", "kind", "parameters", "memory", "held by")
    cells = [(name, recipe.teachers[name].source, *row) for name, row in rows.items()]
    return {"teachers": table([header[: len(cells[0])], *cells])}


def texts_by_teacher(run: RunContext) -> dict[str, list[str]]:
    """Training text that each teacher reads."""
    paths = run.facts.data_paths.get("train", ())
    labelled = list(zip(paths, run.labels["train"], strict=False))
    texts: dict[str, list[str]] = {}
    for index, domain in enumerate(run.recipe.domains):
        for name in domain.teacher_weights:
            texts.setdefault(name, []).extend(p for p, label in labelled if label == index)
    return texts
