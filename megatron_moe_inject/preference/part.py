"""Preference in a run: what measures pairs before a step, and the term in its loss."""

from __future__ import annotations

from typing import Any

from megatron_moe_inject.adapters.token_labels import LabelledStep
from megatron_moe_inject.data.held_out_pairs import HeldOutPairs
from megatron_moe_inject.data.labels import HostGroup
from megatron_moe_inject.data.packed import check_packed, packing_flag
from megatron_moe_inject.data.scheduled_blend import BlendSchedule
from megatron_moe_inject.host.agreement import host_twin
from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.host.loss_seam import LossSeam
from megatron_moe_inject.host.step import StepPart
from megatron_moe_inject.losses.preference import PreferenceSpec
from megatron_moe_inject.losses.student import Vocabulary
from megatron_moe_inject.preference.answers import AnswerReader
from megatron_moe_inject.preference.held_out import HeldOutMeasurement
from megatron_moe_inject.preference.reference import OriginalReference, TeacherReference
from megatron_moe_inject.preference.step import PreferenceStep
from megatron_moe_inject.preference.term import PreferenceTerm
from megatron_moe_inject.recipe.run_kinds import INJECTION
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext, RunPart
from megatron_moe_inject.recipe.schedule import value_at
from megatron_moe_inject.retention.original_pass import OriginalPass
from megatron_moe_inject.retention.selected_pass import SelectedPass
from megatron_moe_inject.teachers.fit import excluded_ids
from megatron_moe_inject.teachers.part import TeacherInfos
from megatron_moe_inject.teachers.served.rules import KIND as SERVED
from megatron_moe_inject.teachers.step_teachers import StepTeachers


class PreferencePart(RunPart):
    """Provides ``PreferenceTerm`` on the last stage where the run trains, and where there are
    held-out pairs ``HeldOutMeasurement``.

    Raises:
        RecipeError: the teacher that is the reference runs no model, or lacks tokens; rows of
            several packs that context-parallel ranks divide.
    """

    def __init__(self, run: RunContext) -> None:
        self._run = run
        check_packed(run.args, run.largest_micro_batch, "objective.preference")
        name = run.recipe.reference_teacher()
        if name is None:
            return
        info = run.need(TeacherInfos).by_name[name]
        what = "has no log-probability for every token of an answer"
        remedy = "measure pairs against a teacher of hf:, megatron: or server:, or the original"
        if not info.runs_model and info.kind != SERVED:
            raise fail(f"teachers.{name}.source", info.source, what, remedy)
        if excluded_ids(info) or info.shared.unknown:
            raise fail(
                f"teachers.{name}.source", info.source, f"{what}: {info.vocabulary}",
                "measure pairs against a teacher with the student's tokenizer, or the original",
            )  # fmt: skip

    def attach(self, student: BuiltStudent) -> StepPart:
        """What takes part in steps.

        Collectives: group creation for the numbers of pairs, and where the run trains those of
        ``host_twin``.
        """
        run, groups = self._run, student.groups
        pairs, seam = run.recipe.objective.preference, run.get(LossSeam)
        assert pairs is not None, "else the feature takes no part"
        tp_group = groups.tp if groups.tp.size() > 1 else None
        vocabulary = Vocabulary(tp_group, run.valid_vocab_size)
        kernels = run.recipe.objective.row_kernels()

        def reader(**of_model: Any) -> AnswerReader | None:
            if seam is None:
                return None
            return AnswerReader(vocabulary, tp_group=tp_group, kernels=kernels, **of_model)

        original, teacher = None, None
        against: str | None = run.recipe.reference_teacher()
        original_pass = run.get(OriginalPass) if against is None else None
        if original_pass is not None:
            against = "original"
            original = OriginalReference(original_pass, reader(head=original_pass.originals.of))
        elif against is not None and seam is not None:
            teacher = TeacherReference(run.need(StepTeachers), vocabulary, kernels)
        spec = PreferenceSpec(pairs.beta, pairs.length_normalised, pairs.label_smoothing)
        source = HostGroup.create(groups.mp)
        held_out = None
        if (of_answers := run.get(HeldOutPairs)) is not None:
            held_out = HeldOutMeasurement(
                of_answers,
                spec,
                against,
                groups=groups,
                source=source,
                original=original,
                teacher=teacher,
                kernels=kernels,
                last=seam is not None,
                packed=packing_flag(run.args) is not None,
                log=run.terms,
                device=student.device,
            )
            run.provide(HeldOutMeasurement, held_out)
        if run.kind != INJECTION:
            return held_out or StepPart()
        term = None
        if seam is not None:
            term = PreferenceTerm()
            run.provide(PreferenceTerm, term)
        schedule = run.need(BlendSchedule)
        return PreferenceStep(
            spec,
            lambda iteration: (value_at(pairs.coeff, iteration), value_at(pairs.sft, iteration)),
            documents=lambda: schedule.documents,
            config=student.chunks[0].config,
            groups=groups,
            source=source,
            data_parallel=host_twin(groups.dp),
            selected=SelectedPass.of_run(run, student, packed=packing_flag(run.args) is not None),
            reader=reader(seam=seam),
            original=original,
            teacher=teacher,
            labels=run.get(LabelledStep),
            term=term,
            device=student.device,
            held_out=held_out,
        )
