"""The teachers of a run: looked at before anything is built, loaded beside the built student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject.data.packed import (
    check_packed,
    check_whole_documents,
    packing_flag,
)
from megatron_moe_inject.host.agreement import agree, host_twin
from megatron_moe_inject.host.finite import FiniteWatch
from megatron_moe_inject.host.megatron_types import Chunk
from megatron_moe_inject.host.step import StepPart
from megatron_moe_inject.host.text import count, memory_text, table
from megatron_moe_inject.recipe.run_kinds import INJECTION
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext, RunPart
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.teachers.base import TeacherInfo
from megatron_moe_inject.teachers.expert_parallel import (
    ExpertGroups,
    check_ranks,
    expert_groups,
)
from megatron_moe_inject.teachers.fit import (
    by_domain,
    checked_teachers,
    helper,
    remarks,
    taught_domains,
    teacher_pass,
)
from megatron_moe_inject.teachers.loading import states_dtype
from megatron_moe_inject.teachers.pace import Pace
from megatron_moe_inject.teachers.pipeline import Helper, Pipeline
from megatron_moe_inject.teachers.placement import (
    Placement,
    Wish,
    needless,
    placements,
    spare_bytes,
)
from megatron_moe_inject.teachers.sources import ALIGNMENTS, SOURCES
from megatron_moe_inject.teachers.step_pass import StepTeacher
from megatron_moe_inject.teachers.step_teachers import ComparesPrefix, OriginalTeacher, StepTeachers


@dataclass(frozen=True)
class TeacherInfos:
    """What the teachers' files say, by name."""

    by_name: Mapping[str, TeacherInfo]


class TeachersPart(RunPart):
    """Provides ``TeacherInfos``, and once attached ``ExpertGroups`` and ``StepTeachers``."""

    def __init__(self, run: RunContext) -> None:
        if run.recipe.teachers:
            check_packed(run.args, run.largest_micro_batch, "a teacher")
            check_whole_documents(run.args, "a teacher")
        self._run = run
        self._infos = checked_teachers(run.recipe, run.args)
        check_ranks(run.recipe, run.args)
        self._aligned = any(info.aligned for info in self._infos.values())
        self._reference: StepTeacher | None = None
        run.provide(TeacherInfos, TeacherInfos(self._infos))

    def describe(self) -> dict[str, Any]:
        """All ranks must have found the same teachers."""
        return {
            f"teachers.{name}.source ({field})": value
            for name, info in self._infos.items()
            for field, value in asdict(info).items()
        }

    def attach(self, student: BuiltStudent) -> StepPart | None:
        """Load them on the last stage, or on all.

        Collectives: those of ``agree``, of ``_spare``, of ``Pipeline`` where one is run by all
        stages, of ``host_twin`` where one has another tokenizer, and of ``expert_groups``.

        Raises:
            RecipeError: on every rank: one cannot be loaded.
        """
        run, last = self._run, student.last
        pipeline = self._pipeline(student)
        self._host_group = host_twin(student.groups.tp) if self._aligned else None
        stages = student.groups.pp
        holders = [
            (run.recipe.teachers[name].ep, where.stages(stages.size()))
            for name, where in self._placements.items()
        ]
        run.provide(ExpertGroups, expert_groups(holders, stages.rank()))
        taught, helpers = agree(
            lambda: (
                ({}, self._helpers(student, pipeline))
                if last is None
                else (self._taught(last, student, pipeline), [])
            )
        )
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
            pipeline=pipeline,
            helpers=helpers,
            reference=self._reference,
        )
        run.provide(StepTeachers, teachers)
        if run.kind == INJECTION:
            texts = {} if dist.get_rank() else texts_by_teacher(run)
            run.warnings += remarks(self._infos, run.args.seq_length, texts)
            run.warnings += needless(run.recipe.teachers, run.facts.parallel.pp)
        return teachers

    def plan_lines(self, given: Mapping[str, list[str]]) -> Mapping[str, list[str]]:
        """With sizes and places."""
        rows = {
            name: (
                described(info),
                count(info.parameters),
                memory_text(self._size(info)),
                held_by(self._placements[name], self._run.facts.parallel.pp),
            )
            for name, info in self._infos.items()
        }
        return teacher_lines(self._run.recipe, rows)

    def _size(self, info: TeacherInfo) -> int:
        """Bytes of its parameters, FP8 copies included."""
        spec = self._run.recipe.teachers[info.name]
        size = states_dtype(spec.dtype, self._run.args.params_dtype).itemsize
        return info.held_bytes(size, spec.ep, spec.fp8 != "none")

    def _pipeline(self, student: BuiltStudent) -> Pipeline | None:
        """Decide which teachers are run by all stages, which then work together."""
        teachers = self._run.recipe.teachers
        wishes = {
            name: Wish.of(teachers[name], info.runs_model, self._size(info))
            for name, info in self._infos.items()
        }
        groups, stages = student.groups, student.groups.pp.size()
        spare = _spare(student) if stages > 1 and wishes else None
        self._placements = placements(wishes, stages, spare)
        order = taught_domains(self._run.recipe)
        names = [name for name in order if self._placements[name].spread]
        if not names:
            return None
        waited_for = [chunk for chunk in student.chunks if chunk is not student.last]
        pace = Pace(waited_for, [n for n in names if teachers[n].ep == 1], student.device)
        return Pipeline(groups.pp, groups.tp_cp, pace, student.device, names)

    def _helpers(self, student: BuiltStudent, pipeline: Pipeline | None) -> list[Helper]:
        """Teachers that a stage without output layer helps with."""
        run = self._run
        return [
            helper(
                *(run.recipe, self._infos[name], run.args, student.device),
                layers_of=self._layers_of,
                experts=run.need(ExpertGroups).of(run.recipe.teachers[name]),
            )
            for name in (() if pipeline is None else pipeline.names)
        ]

    def _layers_of(self, teacher: Any) -> Sequence[int]:
        """Layers of a loaded teacher that some part wants."""
        parts = self._run.parts
        return sorted({layer for part in parts for layer in part.teacher_layers(teacher)})

    def _taught(
        self, chunk: Chunk, student: BuiltStudent, pipeline: Pipeline | None
    ) -> dict[int, Any]:
        """The teachers of the domains, loaded beside the student's last chunk."""
        run = self._run
        passes: dict[str, StepTeacher] = {}
        for name, info in self._infos.items():
            if info.aligned:
                make = ALIGNMENTS[run.recipe.teachers[name].align].in_step
                passes[name] = make(run, info, student, self._host_group)
                continue
            in_step = SOURCES[info.kind].in_step
            if in_step is not None:
                passes[name] = in_step(run, info, student)
                continue
            passes[name] = teacher_pass(
                run.recipe,
                info,
                run.args,
                chunk,
                student.groups,
                valid_vocab_size=run.valid_vocab_size,
                layers_of=self._layers_of,
                pipeline=pipeline if self._placements[name].spread else None,
                experts=run.need(ExpertGroups).of(run.recipe.teachers[name]),
            )
        self._reference = passes.get(run.recipe.reference_teacher() or "")
        return by_domain(run.recipe, passes)


def described(info: TeacherInfo) -> str:
    """What runs, or is read, in a few words."""
    if info.runs_model:
        told = f"{info.kind}: {info.num_layers} layers, hidden {info.hidden_size}"
        if info.experts is None:
            return told
        return f"{told}, {info.experts.topk} of {info.experts.number} experts"
    return info.architecture


def held_by(placement: Placement, stages: int) -> str:
    """Which ranks hold a teacher, and why."""
    if stages == 1:
        return "every rank"
    where = f"all {stages} stages" if placement.spread else "the last stage"
    return f"every rank of {where}, {placement.reason}"


def _spare(student: BuiltStudent) -> int | None:
    """``spare_bytes`` of the fullest rank of all stages but the last; None without a GPU.

    Collectives: on GPUs one all-reduce of one number over the whole world.
    """
    device = student.device
    if device.type != "cuda":
        return None
    spare = memory = torch.cuda.get_device_properties(device).total_memory
    if student.last is None:
        own = [parameter for chunk in student.chunks for parameter in chunk.parameters()]
        size = sum(parameter.numel() * parameter.element_size() for parameter in own)
        trained = sum(parameter.numel() for parameter in own if parameter.requires_grad)
        spare = spare_bytes(memory, size, trained)
    least = torch.tensor(spare, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)


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
