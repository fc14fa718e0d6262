"""Retention in a run: what is kept twice, and the parts of a step that hold to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_moe_inject.data.packed import check_packed, packing_flag
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.beside import Beside, Door
from megatron_moe_inject.host.model_parts import BESIDE
from megatron_moe_inject.host.original_values import OriginalValues
from megatron_moe_inject.host.step import Step, StepPart
from megatron_moe_inject.recipe.preference import measured_by_original
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext, RunPart
from megatron_moe_inject.recipe.schedule import ever_positive, value_at
from megatron_moe_inject.retention.experts import ExpertRetention
from megatron_moe_inject.retention.original_pass import OriginalPass
from megatron_moe_inject.retention.originals import OriginalParameters
from megatron_moe_inject.retention.section import RETENTION
from megatron_moe_inject.retention.selected_pass import SelectedPass
from megatron_moe_inject.retention.start import PullToStart
from megatron_moe_inject.teachers.step_teachers import OriginalTeacher


class RetentionStep(StepPart):
    """What a step does about retention beside gamma and the routers'.

    Args:
        experts: holds experts' outputs; ``None`` without.
        start: pulls parameters to their start; ``None`` without.
    """

    def __init__(self, experts: ExpertRetention | None, start: PullToStart | None) -> None:
        self._experts = experts
        self._start = start
        self.reads_tokens = experts is not None

    def begin(self, step: Step) -> None:
        """Collectives: those of ``ExpertRetention.begin``."""
        if self._experts is not None:
            self._experts.begin(step.labels, step.iteration, step.sequence_length, step.loss_mask)

    def end(self, step: Step, reports: Any) -> None:
        """Collectives: those of ``ExpertRetention.end``, and of ``PullToStart.end`` in training."""
        if self._experts is not None:
            self._experts.end(reports)
        if self._start is not None and step.training:
            self._start.end(step.iteration, reports)


class OriginalsPart(RunPart):
    """Keeps original values; provides ``OriginalValues``, with gamma ``OriginalTeacher``, and with
    that or where pairs are measured against the original ``OriginalPass``.

    Args:
        components: of which, see ``feature.kept_originals``.
    """

    def __init__(self, run: RunContext, components: Sequence[str] | None) -> None:
        if ever_positive(run.recipe.objective.gamma):
            check_packed(run.args, run.largest_micro_batch, "objective.gamma")
        self._run = run
        self._components = components

    def attach(self, student: BuiltStudent) -> StepPart | None:
        """Keep them: as loaded, or as the injection began.

        Collectives: those of ``OriginalParameters.carry``, and for the original model that of
        ``host_twin``.

        Raises:
            RecipeError: on every rank: what the injection began with is missing or damaged.
        """
        run, args = self._run, self._run.args
        apart = ("projections", *BESIDE)
        trains = {name: what for name, what in args.inject_policy.items() if name not in apart}
        on_host = run.recipe[RETENTION].originals == "host"
        beside = [part for part in (run.get(Beside), run.get(Door)) if part is not None]
        originals = OriginalParameters(
            student.chunks, trains, self._components, on_host=on_host, beside=beside
        )
        if run.recipe.train.whole:  # else the model as it is stored is the original
            save = Path(args.save) if args.save and not run.dry_run else None
            remark = originals.carry(run.lineage, save, compat.sharded_state_metadata(args))
            run.warnings += [] if remark is None else [remark]
        run.provide(OriginalValues, originals)
        run.provide(OriginalParameters, originals)
        holds = ever_positive(run.recipe.objective.gamma)
        if holds or measured_by_original(run.recipe.objective.preference):
            original = self._original_pass(originals, student, holds)
            run.provide(OriginalPass, original)
            if holds:
                run.provide(OriginalTeacher, original)
        return None

    def _original_pass(
        self, originals: OriginalParameters, student: BuiltStudent, holds: bool
    ) -> OriginalPass:
        tp, packed = student.groups.tp, packing_flag(self._run.args) is not None
        return OriginalPass(
            originals,
            SelectedPass.of_run(self._run, student, packed=packed),
            holds=holds,
            tp_group=tp if tp.size() > 1 else None,
            packed=packed,
        )


class RetentionPart(RunPart):
    """Holds experts' outputs, and pulls parameters to their start."""

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self._spec = run.recipe[RETENTION]
        if "experts" in self._spec.in_use():
            check_packed(run.args, run.largest_micro_batch, "retention.experts")

    def attach(self, student: BuiltStudent) -> StepPart | None:
        """The retentions of this rank.

        Collectives: those of ``ExpertRetention``.

        Raises:
            RecipeError: experts are to be held, but none train.
        """
        spec, originals = self._spec, self._run.need(OriginalParameters)
        experts = start = None
        if "experts" in spec.in_use():
            experts = ExpertRetention(
                student.chunks,
                student.groups,
                originals,
                lambda iteration: value_at(spec.experts, iteration),
                packed=packing_flag(self._run.args) is not None,
            )
        if "l2" in spec.in_use() and student.optimizer is not None:
            start = PullToStart(
                student.chunks,
                student.groups,
                originals,
                student.optimizer,
                lambda iteration: value_at(spec.l2, iteration),
            )
        return RetentionStep(experts, start) if experts or start else None
