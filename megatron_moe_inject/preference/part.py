"""Preference in a run: what measures pairs before a step, and the term in its loss."""

from __future__ import annotations

from megatron_moe_inject.adapters.token_labels import LabelledStep
from megatron_moe_inject.data.labels import HostGroup
from megatron_moe_inject.host.agreement import host_twin
from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.host.loss_seam import LossSeam
from megatron_moe_inject.losses.preference import PreferenceSpec
from megatron_moe_inject.losses.student import Vocabulary
from megatron_moe_inject.preference.answers import AnswerSums
from megatron_moe_inject.preference.step import PreferenceStep, TeacherReference
from megatron_moe_inject.preference.term import PreferenceTerm
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext, RunPart
from megatron_moe_inject.recipe.schedule import value_at
from megatron_moe_inject.retention.original_pass import OriginalPass
from megatron_moe_inject.retention.selected_pass import SelectedPass
from megatron_moe_inject.teachers.fit import excluded_ids
from megatron_moe_inject.teachers.part import TeacherInfos
from megatron_moe_inject.teachers.step_teachers import StepTeachers


class PreferencePart(RunPart):
    """Provides ``PreferenceTerm`` on the last stage.

    Raises:
        RecipeError: the teacher that is the reference runs no model, or lacks tokens.
    """

    def __init__(self, run: RunContext) -> None:
        self._run = run
        name = run.recipe.reference_teacher()
        if name is None:
            return
        info = run.need(TeacherInfos).by_name[name]
        what = "has no log-probability for every token of an answer"
        remedy = "measure pairs against a teacher of hf: or megatron:, or the original"
        if not info.runs_model:
            raise fail(f"teachers.{name}.source", info.source, what, remedy)
        if excluded_ids(info) or info.shared.unknown:
            raise fail(
                f"teachers.{name}.source", info.source, f"{what}: {info.vocabulary}",
                "measure pairs against a teacher with the student's tokenizer, or the original",
            )  # fmt: skip

    def attach(self, student: BuiltStudent) -> PreferenceStep:
        """What takes part in steps.

        Collectives: group creation for the numbers of pairs, and those of ``host_twin``.
        """
        run, groups = self._run, student.groups
        recipe, seam = run.recipe, run.get(LossSeam)
        pairs = recipe.objective.preference
        assert pairs is not None, "else the feature takes no part"
        tp_group = groups.tp if groups.tp.size() > 1 else None
        vocabulary = Vocabulary(tp_group, run.valid_vocab_size)
        kernels = recipe.objective.row_kernels()
        original = run.get(OriginalPass) if pairs.reference == "original" else None
        answers = term = teacher = None
        if seam is not None:
            own = AnswerSums(vocabulary, tp_group=tp_group, kernels=kernels, seam=seam)
            of_original = AnswerSums(
                vocabulary,
                tp_group=tp_group,
                kernels=kernels,
                head=None if original is None else original.originals.of,
            )
            answers, term = (own, of_original), PreferenceTerm()
            run.provide(PreferenceTerm, term)
            if original is None:
                teachers = run.need(StepTeachers)
                teacher = TeacherReference(teachers, vocabulary, kernels)
        return PreferenceStep(
            PreferenceSpec(pairs.beta, pairs.length_normalised, pairs.label_smoothing),
            lambda iteration: (value_at(pairs.coeff, iteration), value_at(pairs.sft, iteration)),
            config=student.chunks[0].config,
            groups=groups,
            source=HostGroup.create(groups.mp),
            data_parallel=host_twin(groups.dp),
            selected=SelectedPass.of_run(run, student, packed=False),
            answers=answers,
            original=original,
            teacher=teacher,
            labels=run.get(LabelledStep),
            term=term,
            device=student.device,
        )
