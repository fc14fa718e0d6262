"""Feature imitation put together: which terms, which projections, who sends what to whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject.data.packed import check_packed, packing_flag
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.errors import (
    RecipeError,
    listing,
)
from megatron_moe_inject.host.megatron_types import Chunk, Groups
from megatron_moe_inject.host.model_parts import (
    PROJECTIONS,
    decoder_layers,
)
from megatron_moe_inject.host.stored_checkpoint import checkpoint_to_load
from megatron_moe_inject.recipe.run_part import Boundary, BuiltStudent, RunContext, RunPart
from megatron_moe_inject.recipe.schedule import value_at
from megatron_moe_inject.teachers.base import Teacher
from megatron_moe_inject.teachers.fit import taught_domains
from megatron_moe_inject.teachers.imitation.exchange import FeatureExchange, LayerStates
from megatron_moe_inject.teachers.imitation.hook import FORMERLY, ImitationHook
from megatron_moe_inject.teachers.imitation.projections import Projections
from megatron_moe_inject.teachers.imitation.section import IMITATION
from megatron_moe_inject.teachers.imitation.terms import imitation_lines, imitation_terms
from megatron_moe_inject.teachers.loading import states_dtype
from megatron_moe_inject.teachers.part import TeacherInfos
from megatron_moe_inject.teachers.step_teachers import StepTeachers


class ImitationPart(RunPart):
    """One run's feature imitation.

    Raises:
        RecipeError: layers that do not exist, a checkpoint format that cannot leave projections
            out, or a checkpoint to resume that holds other projections than are needed.
    """

    def __init__(self, run: RunContext) -> None:
        check_packed(run.args, run.largest_micro_batch, "imitation")
        packed = packing_flag(run.args) is not None
        self._in_rows = packed and run.largest_micro_batch > 1
        self._run = run
        self._recipe = run.recipe
        self._args = run.args
        teachers = run.need(TeacherInfos).by_name
        self._widths = {name: info.hidden_size for name, info in teachers.items()}
        self._partly = [name for name, info in teachers.items() if info.shared.unknown]
        layers = {name: info.num_layers for name, info in teachers.items()}
        self._terms = imitation_terms(run.recipe, layers, run.facts.num_layers, run.facts.pattern)
        self._hidden_size = run.facts.hidden_size
        self._stored = bool(self._terms) and self._found_in_checkpoint()
        self._projections: list[Projections] = []
        run.warnings.append(
            f"the log's {FORMERLY!r} is called 'imitation loss' now, and written as both"
        )

    def trains(self) -> dict[str, list[str]]:
        """Names of the projections of the whole student."""
        needed = (t for t in self._terms if self._widths[t.teacher] != self._hidden_size)
        return {"projections": sorted({term.projection for term in needed})}

    def _found_in_checkpoint(self) -> bool:
        """Whether the checkpoint that this run goes on from holds the projections it needs."""
        widths = {term.projection: self._widths[term.teacher] for term in self._terms}
        needed = {
            f"{PROJECTIONS}.{name}.weight": (widths[name], self._hidden_size)
            for name in self.trains()["projections"]
        }
        used = self._args.save or self._args.load
        if needed and used and self._args.ckpt_format != "torch_dist":
            raise RecipeError(
                f"--ckpt-format {self._args.ckpt_format} cannot leave projections out where plain "
                "Megatron loads the student; use torch_dist, or a teacher of the student's width"
            )
        checkpoint = checkpoint_to_load(self._args) if needed else None
        if checkpoint is None or not checkpoint.resumes:
            return False
        folder, stored = checkpoint.folder, checkpoint.shapes(f"{PROJECTIONS}.")
        if not stored:
            self._run.warnings.append(
                f"imitation: {folder} holds no projections, so they start anew in a run that goes "
                "on"
            )
        elif stored != needed:
            raise RecipeError(
                f"imitation: {folder} holds projections {listing(sorted(stored), 4)}, but "
                f"now {listing(sorted(needed), 4)} are needed; keep layers and teachers as the run "
                "began, or start an injection of its own with --finetune"
            )
        return bool(stored)

    def before_ddp(self, chunks: Sequence[Chunk]) -> None:
        """Give each bare chunk the projections of its layers, before DDP and the optimizer."""
        for chunk in chunks:
            groups = compat.process_groups(chunk)
            layers = {layer.layer_number - 1 for layer in decoder_layers(chunk)}
            projections = Projections(
                [term for term in self._terms if term.layer in layers],
                self._widths,
                hidden_size=chunk.config.hidden_size,
                like=next(chunk.parameters()),
                seed=self._args.seed,
                sequence_parallel=chunk.config.sequence_parallel,
                tp_group=groups.tp,
            )
            projections.stored = self._stored
            if len(projections):
                chunk.add_module(PROJECTIONS, projections)
            self._projections.append(projections)

    def _check_boundary(self, boundary: int) -> None:
        """A layer that imitates must have something that trains at or below it.

        Raises:
            RecipeError: it has not, so that only its projection would learn.
        """
        below = sorted({term.layer for term in self._terms if term.layer < boundary})
        if below:
            raise RecipeError(
                f"imitation: layers {below} imitate a teacher, but nothing up to them "
                f"trains (the first layer that does is {boundary}); name higher layers in "
                "teachers.*.layers, or train more"
            )

    def plan_lines(self, given: Mapping[str, list[str]]) -> Mapping[str, list[str]]:
        """Which layers imitate which."""
        return {"imitation": imitation_lines(self._terms)}

    def teacher_layers(self, teacher: Teacher) -> list[int]:
        """Layers of a loaded teacher whose states are wanted.

        Raises:
            RecipeError: it does not give them.
        """
        layers = sorted({t.teacher_layer for t in self._terms if t.teacher == teacher.name})
        if layers:
            device = teacher.head_weight(0, 0).device
            tokens = torch.zeros(1, 8, dtype=torch.int64, device=device)
            shapes = [tuple(s.shape) for s in teacher.states(tokens, layers=layers)]
            if shapes != [(1, 8, teacher.hidden_size)] * (1 + len(layers)):
                raise RecipeError(
                    f"teachers.{teacher.name}.source: gives states of shapes {shapes} where "
                    f"[1, 8, {teacher.hidden_size}] after each layer are needed; set "
                    "imitation to 0 or use another teacher"
                )
        return layers

    def attach(self, student: BuiltStudent) -> ImitationHook | None:
        """The hooks of this rank.

        Collectives: one all-gather of layer numbers over the pipeline group.

        Raises:
            RecipeError: on every rank: a layer that imitates lies below everything that trains.
        """
        if not self._terms:
            return None
        self._check_boundary(self._run.need(Boundary).position)
        chunks, groups = student.chunks, student.groups
        for projections in self._projections:
            projections.stored = True
        recipe, imitation = self._recipe, self._recipe[IMITATION]
        taught = taught_domains(recipe)
        exchange = FeatureExchange(
            self._wanted_by_stage(chunks, groups),
            widths=self._widths,
            dtypes={
                name: states_dtype(spec.dtype, self._args.params_dtype)
                for name, spec in recipe.teachers.items()
            },
            groups=groups,
            sequence_parallel=chunks[0].config.sequence_parallel and not self._in_rows,
            device=student.device,
            partly=self._partly,
        )
        return ImitationHook(
            chunks,
            self._projections,
            self._terms,
            exchange,
            self._run.need(StepTeachers),
            taught={name: taught.get(name, []) for name in recipe.teachers},
            weights_at=lambda iteration: {
                name: value_at(getattr(imitation, name), iteration) for name in imitation.in_use()
            },
            loss=imitation.loss,
            domains=[domain.name for domain in recipe.domains],
            by_domain=self._run.several_classes,
            groups=groups,
            in_rows=self._in_rows,
        )

    def _wanted_by_stage(self, chunks: Sequence[Chunk], groups: Groups) -> list[list[LayerStates]]:
        layers = [layer.layer_number - 1 for chunk in chunks for layer in decoder_layers(chunk)]
        terms = self._terms
        stages: list[Any] = [None] * groups.pp.size()
        dist.all_gather_object(stages, layers, group=groups.pp)
        return [
            sorted({LayerStates(t.teacher, t.teacher_layer) for t in terms if t.layer in stage})
            for stage in stages
        ]
