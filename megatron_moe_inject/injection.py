"""Everything one run injects, put together from the recipe and the built student.

``install.py`` says when each method runs; this module says what is built: the freezing policy
before DDP, and after the student is loaded the gradient boundary, the teachers, the loss hook
and the step hook.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject.data.labels import HostGroup
from megatron_moe_inject.data.mixing import mix
from megatron_moe_inject.data.packed import check_packed
from megatron_moe_inject.data.read_once import MeasuredText
from megatron_moe_inject.data.scheduled_blend import BlendSchedule
from megatron_moe_inject.data.splits import SplitRegistry
from megatron_moe_inject.evaluation.evaluator import TrainingEvaluator
from megatron_moe_inject.evaluation.measurement import Measurement
from megatron_moe_inject.evaluation.report.run_log import RunLog
from megatron_moe_inject.experts.choose.choice import resolve_experts
from megatron_moe_inject.experts.choose.profile_setup import ProfileSetup
from megatron_moe_inject.experts.choose.recorder import RoutingRecorder
from megatron_moe_inject.experts.train.boundary import GradientBoundary, agree_boundary
from megatron_moe_inject.experts.train.census import parameter_rows
from megatron_moe_inject.experts.train.frozen_fp8 import drop_transposes
from megatron_moe_inject.experts.train.grouped import train_grouped_experts
from megatron_moe_inject.experts.train.pipeline import (
    agree_forward_stages,
    boundary_step,
    gets_no_graph,
)
from megatron_moe_inject.experts.train.policy import freeze_policy, frozen_fp8
from megatron_moe_inject.experts.train.resume import begin_or_resume
from megatron_moe_inject.experts.train.verify import FrozenChangedError, FrozenCheck
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.agreement import agree, on_first_rank
from megatron_moe_inject.host.errors import (
    RecipeError,
    fail,
)
from megatron_moe_inject.host.files import try_file
from megatron_moe_inject.host.finite import FiniteWatch
from megatron_moe_inject.host.lineage import Lineage
from megatron_moe_inject.host.loss_seam import LossSeam
from megatron_moe_inject.host.model_parts import (
    places,
)
from megatron_moe_inject.host.save_lock import SaveLock
from megatron_moe_inject.host.step import StepPart
from megatron_moe_inject.host.student_load import StudentLoad
from megatron_moe_inject.host.term_log import TermLog, TermStep
from megatron_moe_inject.loss_hook import LossHook
from megatron_moe_inject.losses.report import LossReport
from megatron_moe_inject.losses.spec import TokenWeighting
from megatron_moe_inject.recipe.entries import SPLITS, split_labels
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.plan import Plan, TeacherRow
from megatron_moe_inject.recipe.schedule import ever_positive
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.recipe.student import check_recipe, student_facts_from_args
from megatron_moe_inject.recipe.weights import term_weights
from megatron_moe_inject.retention.original_pass import OriginalPass
from megatron_moe_inject.retention.originals import OriginalParameters
from megatron_moe_inject.retention.setup import kept_components, retention_step
from megatron_moe_inject.routing.rows import RouterRows
from megatron_moe_inject.routing.setup import SteeringSetup
from megatron_moe_inject.step import StepHook
from megatron_moe_inject.teachers import states_dtype
from megatron_moe_inject.teachers.imitation.setup import ImitationSetup
from megatron_moe_inject.teachers.setup import by_domain, checked_teachers, remarks, teacher_pass
from megatron_moe_inject.teachers.step_pass import CommitteePass, TeacherPass
from megatron_moe_inject.teachers.step_teachers import StepTeachers


class Injection:
    """One run's plugin state.

    Args:
        recipe: what to do.
        args: Megatron's parsed arguments.
        valid_vocab_size: ids of the student's tokenizer; those beyond are padding.

    Raises:
        RecipeError: the recipe does not fit the student, its data or the teachers. Nothing
            here needs ``torch.distributed``, so every rank fails alike before any collective.
    """

    def __init__(self, recipe: Recipe, args: Namespace, valid_vocab_size: int) -> None:
        self.dry_run: bool = args.inject_dry_run or False
        self.facts: StudentFacts = student_facts_from_args(args)
        self.recipe = recipe = resolve_experts(recipe, self.facts)
        check_recipe(recipe, self.facts)
        check_packed(
            args,
            max(args.micro_batch_size or 1, getattr(args, "eval_micro_batch_size", None) or 1),
            {
                "steering": recipe.steering.watches,
                "objective.retention.experts": ever_positive(recipe.objective.retention.experts),
                "--inject-profile": getattr(args, "inject_profile", None) is not None,
            },
        )
        order = mix(recipe, args, self.facts)
        self.blend: BlendSchedule | None = None
        if order is not None:
            self.blend = BlendSchedule(order, self.facts.data_paths["train"], args)
        self.policy = freeze_policy(recipe)
        self._fp8 = frozen_fp8(recipe, self.policy, self.facts)
        balancing = getattr(args, "moe_router_load_balancing_type", None) or ()
        if "router" not in self.policy.components and "quantile_balancing" in balancing:
            raise RecipeError(
                "--moe-router-load-balancing-type quantile_balancing goes on moving the bias of "
                "frozen routers; set train.router: true or use another type"
            )
        self._args = args
        self._valid_vocab_size = valid_vocab_size
        self._labels = {split: split_labels(recipe, self.facts, split) for split in SPLITS}
        self.splits = SplitRegistry(self._labels)
        self.teacher_infos = checked_teachers(recipe, args)
        self._profile: ProfileSetup | None = None
        self._recorder: RoutingRecorder | None = None
        if args.inject_profile is not None:
            self._profile = ProfileSetup(recipe, args, self.facts, SPLITS[:1])
        self._lineage = Lineage(args)
        self._steering = SteeringSetup(recipe, self.facts)
        self.evaluator: TrainingEvaluator | None = None
        if recipe.evaluation is not None and not args.skip_train:
            self.evaluator = TrainingEvaluator(recipe, args, self.facts, valid_vocab_size)
        measured = ("valid",) if self.evaluator is not None else ()
        self.measured_text = MeasuredText(args, self.facts, self._labels, measured)
        self.terms = TermLog(args)
        self.run_log: RunLog | None = None
        if self.evaluator is not None and args.save:
            self.run_log = RunLog(
                recipe, args, self.evaluator.path, self._lineage, self.terms.interval()
            )
        self.imitation = ImitationSetup(recipe, args, self.facts, self.teacher_infos)
        self.student_load = StudentLoad(args)
        self._rows = RouterRows(self.policy.rows, args)
        self.chunks: list[torch.nn.Module] = []
        self.originals: OriginalParameters | None = None
        remark = begin_or_resume(self.policy, args, self.imitation.projections)
        self._warnings = [] if remark is None else [remark]
        self._steering.begin_or_resume(args)
        self.plan: Plan | None = None
        self._watch = FiniteWatch()
        self.step_hook: StepHook | None = None
        self._frozen: FrozenCheck | None = None

    def claim_folder(self) -> None:
        """Keep other runs out of the folder that this one saves to.

        Collectives: those of ``on_first_rank``, where it saves.

        Raises:
            RecipeError: on every rank, where another run holds it or it cannot be written to.
        """
        if self._args.save and not self.dry_run and not self._args.skip_train:
            on_first_rank(SaveLock(self._args.save).take)

    def building(self) -> contextlib.AbstractContextManager[None]:
        """Inside, Megatron builds the student."""
        return contextlib.nullcontext() if self._fp8 is None else self._fp8.while_building()

    def freeze(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """``pre_wrap_hooks`` entry: watch what bare chunks are given, apply the policy to them, let
        grouped experts that are frozen in part train, and add projections and router rows that
        train. No collective."""
        self.student_load.watch(chunks)
        self.policy.apply(chunks)
        train_grouped_experts(chunks)
        drop_transposes(chunks)
        self.imitation.add_projections(chunks)
        self._rows.add(chunks)
        return chunks

    def attach(self, chunks: Sequence[torch.nn.Module], optimizer: Any = None) -> None:
        """Attach to the student once it is built and loaded.

        Args:
            chunks: this rank's bare model chunks.
            optimizer: Megatron's, ``None`` in a run that only evaluates.

        Collectives, over the whole world: those of ``StudentLoad.verify`` and, where files are
        written about the student, of its ``origin``; those of ``_check_patterns``,
        ``Lineage.agree``, ``_keep_originals``, ``ProfileSetup.recorder`` and ``_parts``; one
        all-reduce for the boundary, group creation for the labels, one all-gather for the plan;
        over the pipeline, one all-gather for the stages that run forward only.

        Raises:
            RecipeError: on every rank, if a teacher cannot be loaded, nothing trains, or a layer
                that imitates a teacher lies below everything that trains.
        """
        self.chunks = list(chunks)
        self.student_load.verify()
        self._say_origin()
        self._rows.loaded()
        if self._fp8 is not None:
            agree(self._fp8.check)
        device = next(self.chunks[0].parameters()).device
        self._check_patterns()
        boundary = agree_boundary(self.chunks, self.facts.num_layers, device)
        self.imitation.check_boundary(boundary)
        groups = compat.process_groups(self.chunks[0])
        forward_stages = agree_forward_stages(self.chunks, boundary, groups.pp)
        for i, chunk in enumerate(self.chunks):
            GradientBoundary(chunk, boundary, cut=gets_no_graph(i, forward_stages, groups.pp))
        host_group = HostGroup.create(groups.mp)
        self._lineage.agree()
        self.originals = self._keep_originals()
        if self._profile is not None:
            self._recorder = self._profile.recorder(self.chunks, groups)
        if self.evaluator is not None:
            self.evaluator.prepare(self.chunks[0])
            remark = self.evaluator.adopt(self._lineage)
            self._warnings += [] if remark is None else [remark]
        if self.facts.precision.fp8 is not None:
            self._watch.see_layers(self.chunks)
        self.step_hook = StepHook(
            self.splits,
            host_group,
            lambda: compat.optimizer_steps(self._args),
            self._parts(groups, boundary, forward_stages, optimizer),
        )
        self.plan = Plan(
            self.recipe,
            facts=self.facts,
            parameters=parameter_rows(self.chunks, groups),
            teachers=[self._teacher_row(name) for name in self.teacher_infos],
            boundary=boundary,
            imitation=[term.row for term in self.imitation.terms],
            warnings=self._warnings
            + self.student_load.remarks
            + self.imitation.warnings
            + self._steering.warnings
            + remarks(self.teacher_infos, self._args.seq_length, self._texts_by_teacher()),
        )

    def _say_origin(self) -> None:
        """Tell what writes files about the student what was loaded; nothing where none is written.

        Collectives: those of ``StudentLoad.origin``.
        """
        writers = [w for w in (self._profile, self.evaluator, self.run_log) if w is not None]
        if writers and not self.dry_run:
            origin = self.student_load.origin()
            for writer in writers:
                writer.origin = origin

    def _texts_by_teacher(self) -> dict[str, list[str]]:
        """Training text that each teacher reads, on the rank that prints the plan."""
        paths = [] if dist.get_rank() else self.facts.data_paths.get("train") or []
        labelled = list(zip(paths, self._labels["train"], strict=False))
        found: dict[str, list[str]] = {}
        for index, domain in enumerate(self.recipe.domains):
            for name in domain.teacher_weights:
                found.setdefault(name, []).extend(p for p, label in labelled if label == index)
        return found

    def _check_patterns(self) -> None:
        """Every pattern of ``train.patterns`` must name a parameter of some rank, and none one
        that pipeline stages share.

        Collectives: one all-gather of pattern lists over the whole world, where there are any.
        """
        if not self.policy.patterns:
            return
        everywhere = [at for chunk in self.chunks for at, _ in places(chunk)]
        own = {(p, at.component) for at in everywhere for p in self.policy.matches(at)}
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        for i, pattern in enumerate(self.policy.patterns):
            components = {kind for found in ranks for p, kind in found if p == pattern}
            if self.facts.tied_embeddings and components & {"embedding", "output_layer"}:
                raise fail(
                    f"train.patterns[{i}]", pattern, "names the matrix that embedding and output "
                    "layer share", "set train.embedding and train.output_layer instead",
                )  # fmt: skip
            if not components:
                raise fail(
                    f"train.patterns[{i}]", pattern, "matches no parameter of the student",
                    "names look like decoder.layers.3.mlp.experts.17.linear_fc1.weight",
                )  # fmt: skip

    def _keep_originals(self) -> OriginalParameters | None:
        """The original parameters where retention needs them: as loaded, or as the run began."""
        components = kept_components(self.recipe)
        if components == []:
            return None
        args = self._args
        trains = {name: of for name, of in args.inject_policy.items() if name != "projections"}
        on_host = self.recipe.objective.retention.originals == "host"
        originals = OriginalParameters(self.chunks, trains, components, on_host=on_host)
        save = Path(args.save) if args.save and not self.dry_run else None
        remark = originals.carry(self._lineage, save, compat.sharded_state_metadata(args))
        self._warnings += [] if remark is None else [remark]
        return originals

    def _parts(
        self, groups: Any, boundary: int, forward_stages: int, optimizer: Any
    ) -> list[StepPart]:
        """What takes part in a step of this rank, in order.

        Collectives: those of ``agree``, ``_original_pass``, ``ImitationSetup.hook``,
        ``SteeringSetup.step`` and ``retention_step``.
        """
        last = next((c for c in self.chunks if c.post_process), None)
        seam = None if last is None else LossSeam(last)
        taught = agree(lambda: {} if last is None else self._taught(last, groups))
        measurement = self._measurement
        objective = self.recipe.objective
        kernels = None if objective.kernels == "torch" else objective.kernels
        teachers = StepTeachers(
            taught,
            self._original_pass(seam, groups),
            valid_vocab_size=self._valid_vocab_size,
            kernels=kernels,
            see=self._watch.see,
            compares_prefix=lambda: measurement is not None and measurement.compares_prefix,
        )
        loss = None
        if seam is not None:
            loss = self._loss_hook(seam, groups, teachers, kernels)
        original = None if self.originals is None else self.originals.of
        parts = [
            measurement,
            self._watch,
            teachers,
            loss,
            self.imitation.hook(self.chunks, groups, teachers, by_domain=self._several_classes),
            self._recorder,
            self._steering.step(self.chunks, groups, boundary, original, teachers),
            retention_step(self.recipe, self.chunks, groups, self.originals, optimizer),
            boundary_step(self.chunks, forward_stages, groups.pp),
            TermStep(self.terms, groups),
        ]
        return [part for part in parts if part is not None]

    def _original_pass(self, seam: LossSeam | None, groups: Any) -> OriginalPass | None:
        """Collectives: one ``new_group`` over the whole world where there is retention."""
        if self.originals is None or not ever_positive(self.recipe.objective.gamma):
            return None
        interleaved = len(self.chunks) > 1
        stages = groups.pp.size() if interleaved else 1
        config = self.chunks[0].config
        everyone = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        resets = {
            "position_ids": self._args.reset_position_ids,
            "attention_mask": self._args.reset_attention_mask,
        }
        return OriginalPass(
            self.originals,
            seam,
            tp_group=groups.tp if groups.tp.size() > 1 else None,
            stages=stages,
            group=config.microbatch_group_size_per_vp_stage if interleaved else 1,
            host_group=everyone,
            whole=groups.tp.size() > 1,
            same=[key for key, reset in resets.items() if not reset],
        )

    def _teacher_row(self, name: str) -> TeacherRow:
        info = self.teacher_infos[name]
        item = states_dtype(self.recipe.teachers[name].dtype, self._args.params_dtype).itemsize
        kind = f"{info.kind}: {info.num_layers} layers, hidden {info.hidden_size}"
        return TeacherRow(
            name, kind, info.parameters, info.parameters * item, "every rank of the last stage"
        )

    def _taught(
        self, chunk: torch.nn.Module, groups: Any
    ) -> dict[int, TeacherPass | CommitteePass]:
        """The teachers of the domains, loaded beside the student's last chunk."""
        passes = {name: self._teacher_pass(name, chunk, groups) for name in self.recipe.teachers}
        return by_domain(self.recipe, passes)

    def _loss_hook(
        self, seam: LossSeam, groups: Any, teachers: StepTeachers, kernels: str | None
    ) -> LossHook:
        objective = self.recipe.objective
        report = LossReport(
            [domain.name for domain in self.recipe.domains],
            distilled=teachers.domains,
            by_class=self._several_classes,
            weighted=bool(TokenWeighting(objective.confidence, objective.skip_worse)),
            retained=ever_positive(objective.gamma),
            shares=bool(self.recipe.mixing),
        )
        return LossHook(
            seam,
            lambda iteration: term_weights(self.recipe, iteration),
            teachers,
            report,
            tp_group=groups.tp,
            valid_vocab_size=self._valid_vocab_size,
            masked_sum=objective.masked_sum,
            kernels=kernels,
            measurement=self._measurement,
            watch=self._watch,
            running_confidence=self._steering.running,
            cp_group=groups.cp,
            by_document=bool(getattr(self._args, "sft", False)),
        )

    @property
    def _measurement(self) -> Measurement | None:
        return None if self.evaluator is None else self.evaluator.measurement

    @property
    def _several_classes(self) -> bool:
        """Whether the training data has more than one kind of sample to report on."""
        return len(set(self._labels["train"])) > 1

    def _teacher_pass(self, name: str, chunk: torch.nn.Module, groups: Any) -> TeacherPass:
        return teacher_pass(
            self.recipe,
            self.teacher_infos[name],
            self._args,
            chunk,
            groups,
            valid_vocab_size=self._valid_vocab_size,
            layers_of=self.imitation.teacher_layers,
        )

    def begin_training(self) -> None:
        """Remember what must not change, if ``--inject-verify-frozen`` asks for the proof."""
        if self.recipe.verify_frozen:
            self._frozen = FrozenCheck(self.chunks, self.policy, self.policy.rows)

    def finish(self) -> Iterator[str]:
        """Once Megatron's last checkpoint is saved: write the routing profile, check what must not
        have changed, and say how evaluations failed; yields what to say, rank by rank the same.

        Collectives: those of ``ProfileSetup.write`` and ``FrozenCheck.verify``.

        Raises:
            RecipeError: on every rank, after everything was tried: all that failed.
        """
        failed: list[str] = []
        for step in (self._write_profile, self._verify_frozen, self._check_evaluations):
            try:
                said = step()
            except (RecipeError, FrozenChangedError) as error:
                failed.append(str(error))
            else:
                if said is not None:
                    yield said
        if failed:
            save = self._args.save
            saved = f"; what was trained is saved in {save}" if save else ""
            raise RecipeError("; ".join(failed) + saved)

    def _write_profile(self) -> str | None:
        if self._profile is None:
            return None
        return self._profile.write(self._recorder, self.measured_text.repeated_in_training())

    def _verify_frozen(self) -> str | None:
        return None if self._frozen is None else self._frozen.verify()

    def _check_evaluations(self) -> None:
        if self.evaluator is not None:
            self.evaluator.finish()

    def try_outputs(self) -> None:
        """See that what the run is to write can be written, before anything is built.

        Collectives: those of ``agree``.

        Raises:
            RecipeError: on every rank: something cannot.
        """
        agree(self._try_own_outputs)

    def _try_own_outputs(self) -> None:
        """Those that this rank writes."""
        if self.dry_run:
            return
        if self._profile is not None and dist.get_rank() == 0:
            self._profile.try_output()
        if self.evaluator is not None and dist.get_rank() == 0:
            named = self.recipe.evaluation.file is not None
            try_file(self.evaluator.path, "evaluation.file" if named else "--save")
        if self.run_log is not None and dist.get_rank() == dist.get_world_size() - 1:
            try_file(self.run_log.path, "--save")
