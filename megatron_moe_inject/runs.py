"""Runs that only evaluate: they record a routing profile, or measure student and teachers."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject.data.labels import HostGroup
from megatron_moe_inject.data.mixing import mix_held_out
from megatron_moe_inject.data.packed import check_packed
from megatron_moe_inject.data.read_once import MeasuredText
from megatron_moe_inject.data.splits import SplitRegistry
from megatron_moe_inject.evaluation.evaluation import Evaluation
from megatron_moe_inject.evaluation.evaluation_file import write_evaluation
from megatron_moe_inject.evaluation.evaluator import Evaluator, describe
from megatron_moe_inject.experts.choose.profile_setup import ProfileSetup
from megatron_moe_inject.experts.choose.recorder import RoutingRecorder
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.agreement import agree, on_first_rank
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.files import try_file
from megatron_moe_inject.host.labels import GENERAL
from megatron_moe_inject.host.loss_seam import LossSeam
from megatron_moe_inject.host.progress import StepProgress
from megatron_moe_inject.host.step import StepPart
from megatron_moe_inject.host.student_load import StudentLoad
from megatron_moe_inject.host.term_log import TermLog, TermStep
from megatron_moe_inject.loss_hook import LossHook
from megatron_moe_inject.losses.objective import TermWeights
from megatron_moe_inject.losses.report import LossReport
from megatron_moe_inject.recipe.entries import SPLITS, split_labels
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.recipe.student import check_options, student_facts_from_args
from megatron_moe_inject.step import StepHook
from megatron_moe_inject.teachers.setup import by_domain, checked_teachers, teacher_pass
from megatron_moe_inject.teachers.step_pass import CommitteePass, TeacherPass
from megatron_moe_inject.teachers.step_teachers import StepTeachers


class EvaluationRun(Evaluator):
    """A run that only measures; see ``injection.Injection`` for its part in it.

    Args:
        recipe: names the classes and teachers; what trains is not used.
        args: Megatron's arguments.
        valid_vocab_size: ids of the student's tokenizer.
    """

    plan = None
    run_log = None
    blend = None

    def __init__(self, recipe: Recipe, args: Namespace, valid_vocab_size: int) -> None:
        flag = "--inject-evaluate"
        if args.inject_dry_run:
            raise RecipeError(
                "--inject-dry-run: a run that only measures has no plan to show; leave it out"
            )
        self._path = Path(args.inject_evaluate)
        if not self._path.absolute().parent.is_dir():
            raise RecipeError(f"{flag}: {self._path.absolute().parent} is no folder")
        facts = student_facts_from_args(args)
        check_options(recipe, facts)
        mix_held_out(recipe, args, facts)
        super().__init__(recipe, args, facts, valid_vocab_size, reason=flag)
        self.dry_run = False
        self.terms = TermLog(args)
        self.student_load = StudentLoad(args)
        self.teacher_infos = checked_teachers(recipe, args)
        labels = {s: split_labels(recipe, facts, s) for s in SPLITS}
        self.splits = SplitRegistry(labels)
        self.measured_text = MeasuredText(args, facts, labels, ("valid",), flag)
        self.step_hook: StepHook | None = None
        self._said = ""

    @property
    def evaluator(self) -> EvaluationRun:
        """Itself."""
        return self

    def claim_folder(self) -> None:
        """Nothing is saved."""

    building = staticmethod(contextlib.nullcontext)
    """What surrounds the building of the student: nothing."""

    def freeze(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Nothing is frozen; what is loaded is watched."""
        self.student_load.watch(chunks)
        return chunks

    def attach(self, chunks: Sequence[torch.nn.Module], optimizer: Any = None) -> None:
        """Attach to a student that is built and loaded.

        Collectives: those of ``StudentLoad.verify`` and ``origin``, group creation for the labels,
        and those of ``agree``.
        """
        self.student_load.verify()
        self.origin = self.student_load.origin()
        groups = compat.process_groups(chunks[0])
        self.prepare(chunks[0])
        last = next((chunk for chunk in chunks if chunk.post_process), None)
        taught = agree(lambda: {} if last is None else self._taught(last, groups))
        measurement = self.measurement
        teachers = StepTeachers(
            taught,
            valid_vocab_size=self._valid_vocab_size,
            compares_prefix=lambda: measurement.compares_prefix,
        )
        parts: list[StepPart] = [measurement, teachers]
        if last is not None:
            parts.append(self._loss_hook(last, groups, teachers))
        self.step_hook = StepHook(
            self.splits,
            HostGroup.create(groups.mp),
            lambda: compat.optimizer_steps(self.args),
            [*parts, TermStep(self.terms, groups)],
        )

    def _taught(
        self, chunk: torch.nn.Module, groups: Any
    ) -> dict[int, TeacherPass | CommitteePass]:
        recipe, size = self.recipe, self._valid_vocab_size
        passes = {
            name: teacher_pass(recipe, info, self.args, chunk, groups, valid_vocab_size=size)
            for name, info in self.teacher_infos.items()
        }
        return by_domain(recipe, passes)

    def _loss_hook(self, chunk: torch.nn.Module, groups: Any, teachers: StepTeachers) -> LossHook:
        domains = self.recipe.domains
        report = LossReport([d.name for d in domains], teachers.domains, by_class=True)
        weights = dict.fromkeys((GENERAL, *range(len(domains))), TermWeights(0.0, 1.0))
        return LossHook(
            LossSeam(chunk),
            lambda iteration: weights,
            teachers,
            report,
            tp_group=groups.tp,
            valid_vocab_size=self._valid_vocab_size,
            measurement=self.measurement,
            only_measures=True,
        )

    def iteration(self, told: int) -> int:
        """The checkpoint's iteration, also where ``--finetune`` makes Megatron count from 0."""
        return told if self.origin.iteration is None else self.origin.iteration

    def other_data(self, evaluate: Callable[[], Any]) -> None:
        """The test data are not read."""

    def record(self, evaluation: Evaluation) -> None:
        """Write the file.

        Collectives: those of ``on_first_rank``.
        """
        on_first_rank(lambda: write_evaluation(self._path, evaluation))
        self._said = f"evaluation: written to {self._path}\n" + describe(evaluation)

    def before_training(self, *_: Any) -> None:
        """Never called: ``--skip-train``."""

    def begin_training(self) -> None:
        """Never called: ``--skip-train``."""

    def try_outputs(self) -> None:
        """See that the file can be written, before anything is built.

        Collectives: those of ``on_first_rank``.

        Raises:
            RecipeError: on every rank: it cannot.
        """
        on_first_rank(lambda: try_file(self._path, "--inject-evaluate"))

    def finish(self) -> Iterator[str]:
        """What was found.

        Raises:
            RecipeError: nothing was, or not all of the text was read in time.
        """
        if not self._said:
            raise RecipeError(
                f"--inject-evaluate: the validation data were not read to the end, {self._path} is "
                "not written; give --split or --valid-data-path some, and "
                "--exit-duration-in-mins enough time"
            )
        yield self._said


class ProfileRun:
    """A run that only evaluates and records; see ``injection.Injection`` for its part in it.

    Args:
        recipe: names the classes of data; the rest of it is not used.
        args: Megatron's arguments.
    """

    plan = None
    evaluator = None
    run_log = None
    blend = None
    terms = None

    def __init__(self, recipe: Recipe, args: Namespace) -> None:
        self.dry_run = False
        if args.inject_dry_run:
            raise RecipeError(
                "--inject-dry-run: a run that only records a profile has no plan to show; leave "
                "out --skip-train or --inject-dry-run"
            )
        facts = student_facts_from_args(args)
        check_packed(args, args.eval_micro_batch_size, {"--inject-profile": True})
        mix_held_out(recipe, args, facts)
        self.student_load = StudentLoad(args)
        self.recipe = recipe
        self._args = args
        self._setup = ProfileSetup(recipe, args, facts, SPLITS[1:])
        labels = {s: split_labels(recipe, facts, s) for s in SPLITS}
        self.splits = SplitRegistry(labels)
        self.measured_text = MeasuredText(args, facts, labels, SPLITS[1:], "--inject-profile")
        self.step_hook: StepHook | None = None
        self._recorder: RoutingRecorder | None = None
        self._progress: StepProgress | None = None

    def claim_folder(self) -> None:
        """Nothing is saved."""

    building = staticmethod(contextlib.nullcontext)
    """What surrounds the building of the student: nothing."""

    def freeze(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Nothing is frozen; what is loaded is watched."""
        self.student_load.watch(chunks)
        return chunks

    def attach(self, chunks: Sequence[torch.nn.Module], optimizer: Any = None) -> None:
        """Watch the routers of a student that is built and loaded.

        Collectives: those of ``StudentLoad.verify`` and ``origin``, group creation for the labels,
        and those of ``ProfileSetup.recorder``.
        """
        self.student_load.verify()
        self._setup.origin = self.student_load.origin()
        groups = compat.process_groups(chunks[0])
        self._recorder = self._setup.recorder(chunks, groups)
        self._progress = StepProgress(dist.get_rank(), self._steps)
        self.step_hook = StepHook(
            self.splits,
            HostGroup.create(groups.mp),
            lambda: compat.optimizer_steps(self._args),
            [self._recorder, self._progress],
        )

    def _steps(self) -> int | None:
        """How many steps Megatron evaluates, None where it reads all of the data."""
        splits = [getattr(self._args, name, True) for name in ("do_valid", "do_test")]
        iterations = self._args.eval_iters
        return sum(map(bool, splits)) * iterations if iterations and iterations > 0 else None

    def begin_training(self) -> None:
        """Never called: ``--skip-train``."""

    def try_outputs(self) -> None:
        """See that the profile can be written, before anything is built.

        Collectives: those of ``on_first_rank``.

        Raises:
            RecipeError: on every rank: it cannot.
        """
        on_first_rank(self._setup.try_output)

    def finish(self) -> Iterator[str]:
        """Write the profile; see ``ProfileSetup.write``."""
        self._progress.close()
        yield self._setup.write(self._recorder)
