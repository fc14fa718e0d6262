"""One run of the plugin: its features' parts, phase by phase.

``install.py`` says when each method runs. Runs that train, that measure and that record a profile
differ in which features take part (``recipe.features``), and in what is checked before.
"""

from __future__ import annotations

import contextlib
import functools
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from megatron_moe_inject import contracts
from megatron_moe_inject.data.labels import HostGroup
from megatron_moe_inject.data.packed import check_pipeline, packing_flag
from megatron_moe_inject.data.read_once import MeasuredText
from megatron_moe_inject.data.splits import SplitRegistry
from megatron_moe_inject.experts.choose.choice import resolve_experts
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.agreement import agree, on_first_rank
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.finite import FiniteWatch
from megatron_moe_inject.host.leave import LeaveTraining
from megatron_moe_inject.host.loss_seam import LossSeam
from megatron_moe_inject.host.megatron_types import Chunk, Optimizer
from megatron_moe_inject.host.save_lock import SaveLock
from megatron_moe_inject.host.step import StepPart
from megatron_moe_inject.host.stored_checkpoint import newest_saved
from megatron_moe_inject.host.student_load import StudentLoad
from megatron_moe_inject.host.term_log import TermStep
from megatron_moe_inject.recipe.entries import SPLITS, split_labels
from megatron_moe_inject.recipe.feature import Feature
from megatron_moe_inject.recipe.features import FEATURES
from megatron_moe_inject.recipe.plan import Plan, render_plan
from megatron_moe_inject.recipe.run_kinds import EVALUATION, GENERATION, INJECTION, PROFILE
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext, RunPart
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.recipe.student import check_options, check_recipe, student_facts_from_args
from megatron_moe_inject.step import StepHook

_NO_PLAN = {
    EVALUATION: "--inject-dry-run: a run that only measures has no plan to show; leave it out",
    PROFILE: "--inject-dry-run: a run that only records a profile has no plan to show; leave out "
    "--skip-train or --inject-dry-run",
    GENERATION: "--inject-dry-run: a run that only writes text has no plan to show; leave it out",
}


class Run:
    """One run's plugin state.

    Args:
        kind: see ``recipe.run_kinds``.
        recipe: what to do.
        args: Megatron's parsed arguments.
        valid_vocab_size: ids of the student's tokenizer; those beyond are padding.
        features: by name, those that may take part.

    Attributes:
        context: what the parts share.
        parts: by name of the feature.
        splits: which split each data iterator reads.
        step_hook: once attached, what takes part in steps.

    Raises:
        RecipeError: the recipe does not fit the student, its data or the teachers. Nothing
            here needs ``torch.distributed``, so every rank fails alike before any collective.
    """

    def __init__(
        self,
        kind: str,
        recipe: Recipe,
        args: Namespace,
        valid_vocab_size: int,
        features: Mapping[str, Feature] | None = None,
    ) -> None:
        if args.inject_dry_run and kind in _NO_PLAN:
            raise RecipeError(_NO_PLAN[kind])
        facts = student_facts_from_args(args)
        if kind == INJECTION:
            recipe = resolve_experts(recipe, facts)
            check_recipe(recipe, facts)
        elif kind in (EVALUATION, GENERATION):
            check_options(recipe, facts, kind)
        if features is None:
            features = {name: FEATURES[name] for name in FEATURES.names()}
        contracts.require(
            contracts.in_use(recipe, facts, args, kind=kind, features=features.values())
        )
        labels = {split: split_labels(recipe, facts, split) for split in SPLITS}
        self.context = context = RunContext(kind, recipe, args, facts, valid_vocab_size, labels)
        self.splits = SplitRegistry(labels)
        context.provide(SplitRegistry, self.splits)
        self.student_load = StudentLoad(args)
        self._features = features
        self.parts: dict[str, RunPart] = {}
        for name, feature in features.items():
            part = feature.start(context) if kind in feature.runs else None
            if part is not None:
                self.parts[name] = part
        self._text = _measured_text(context, self.parts.values())
        context.provide(MeasuredText, self._text)
        check_pipeline(args, context.largest_micro_batch)
        context.parts = [_Own(self), self._text, *self.parts.values()]
        if kind == INJECTION:
            context.parts.append(_Leaving(args))
        for part in context.parts:
            part.prepare()
        self.step_hook: StepHook | None = None

    @property
    def recipe(self) -> Recipe:
        """As far resolved as this run resolves it."""
        return self.context.recipe

    @property
    def dry_run(self) -> bool:
        """Whether the run ends when all is attached."""
        return self.context.dry_run

    def describe(self) -> dict[str, Any]:
        """What all ranks must agree on besides recipe and flags."""
        described: dict[str, Any] = {}
        for part in self.context.parts:
            described |= part.describe()
        for split, labels in self.splits.by_split.items():
            described[f"--data-path (domains of {split})"] = labels
        return described

    def claim_folder(self) -> None:
        """Keep other runs out of the folder that this one saves to.

        Collectives: those of ``on_first_rank``, where it saves.

        Raises:
            RecipeError: on every rank, where another run holds it or it cannot be written to.
        """
        args = self.context.args
        if args.save and not self.dry_run and not args.skip_train:
            on_first_rank(SaveLock(args.save).take)

    def try_outputs(self) -> None:
        """See that what the run is to write can be written, before anything is built.

        Collectives: those of ``agree``.

        Raises:
            RecipeError: on every rank: something cannot.
        """
        if not self.dry_run:
            agree(self._try_outputs)

    def _try_outputs(self) -> None:
        for part in self.context.parts:
            part.try_outputs()

    def building(self) -> contextlib.ExitStack:
        """Inside, Megatron builds and loads the student."""
        stack = contextlib.ExitStack()
        for part in self.context.parts:
            stack.enter_context(part.building())
        return stack

    def before_ddp(self, chunks: list[Chunk]) -> list[Chunk]:
        """``pre_wrap_hooks`` entry: watch what bare chunks are given, and let the parts change
        them. No collective."""
        self.student_load.watch(chunks)
        for part in self.context.parts:
            part.before_ddp(chunks)
        return chunks

    def attach(self, chunks: Sequence[Chunk], optimizer: Optimizer = None) -> None:
        """Attach to the student once it is built and loaded.

        Args:
            chunks: this rank's bare model chunks.
            optimizer: Megatron's, ``None`` in a run that only evaluates.

        Collectives, over the whole world: those of ``StudentLoad.verify``, of its ``origin`` where
        files are written about the student, and of ``Lineage.agree`` where the run trains; group
        creation for the labels; those of the parts.

        Raises:
            RecipeError: on every rank: a part cannot do what is asked.
        """
        context, student = self.context, BuiltStudent.of_chunks(chunks, optimizer)
        self.student_load.verify()
        if not self.dry_run and any(part.writes_about for part in context.parts):
            context.origin = self.student_load.origin()
        for part in context.parts:
            part.loaded(student)
        host_group = HostGroup.create(student.groups.mp)
        steps = self._watch(student)
        if context.kind == INJECTION:
            context.lineage.agree()
        steps += [step for part in context.parts if (step := part.attach(student)) is not None]
        self.step_hook = StepHook(
            self.splits,
            host_group,
            lambda: compat.optimizer_steps(context.args),
            [*steps, TermStep(context.terms, student.groups)],
            packed=packing_flag(context.args) is not None,
        )
        if context.kind == INJECTION:
            context.plan = render_plan(self._plan())

    def _watch(self, student: BuiltStudent) -> list[StepPart]:
        """The seam of the loss; in training, what sees where a step stops being finite."""
        context = self.context
        if context.kind not in (PROFILE, GENERATION) and student.last is not None:
            context.provide(LossSeam, LossSeam(student.last))
        if context.kind != INJECTION:
            return []
        watch = FiniteWatch()
        if context.facts.precision.fp8 is not None:
            watch.see_layers(student.chunks)
        context.provide(FiniteWatch, watch)
        return [watch]

    def _plan(self) -> Plan:
        recipe, facts = self.context.recipe, self.context.facts
        lines: dict[str, list[str]] = {}
        for name, feature in self._features.items():
            planned = feature.plan_lines(recipe, facts)
            part = self.parts.get(name)
            for title, more in (planned if part is None else part.plan_lines(planned)).items():
                lines.setdefault(title, []).extend(more)
        return Plan(recipe, facts, lines, self.context.warnings + self.student_load.remarks)

    def call(self, name: str, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call a function of Megatron's with the parts that stand around it.

        Args:
            name: see ``RunPart.around``; the first part stands next to the stock function.
        """
        for part in self.context.parts:
            around = part.around.get(name)
            if around is not None:
                stock = functools.wraps(stock)(functools.partial(around, stock))
        return stock(*args, **kwargs)

    def begin_training(self) -> None:
        """Before the first step that trains."""
        for part in self.context.parts:
            part.begin_training()

    def finish(self) -> Iterator[str]:
        """Once Megatron's last checkpoint is saved; yields what the parts say, rank by rank the
        same.

        Collectives: those of the parts.

        Raises:
            RecipeError: on every rank, after everything was tried: all that failed.
        """
        failed: list[str] = []
        for part in self.context.parts:
            try:
                message = part.finish()
            except RecipeError as error:
                failed.append(str(error))
            else:
                if message is not None:
                    yield message
        if failed:
            save = self.context.args.save if self.context.kind == INJECTION else None
            saved = f"; what was trained is saved in {save}" if save else ""
            raise RecipeError("; ".join(failed) + saved)


class _Own(RunPart):
    """What every run does at Megatron's functions, next to the stock ones."""

    def __init__(self, run: Run) -> None:
        terms = run.context.terms
        self.around = {
            "_load_base_checkpoint": run.student_load.read,
            "evaluate": terms.evaluate,
            "evaluate_and_print_results": terms.print_evaluation,
            "training_log": terms.log,
        }


class _Leaving(RunPart):
    """Lets a part of a step end training with a checkpoint; around all that other parts do."""

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._begun = 0
        self._leave = LeaveTraining(self._saves)
        self.around = self._leave.around

    def begin_training(self) -> None:
        """Remember what need not be saved again."""
        self._begun = compat.optimizer_steps(self._args)

    def _saves(self) -> bool:
        """Whether something was trained that no checkpoint has. Every rank asks at once."""
        steps = compat.optimizer_steps(self._args)
        if not self._args.save or steps == self._begun:
            return False
        newest = newest_saved(self._args)
        return newest is None or newest.iteration != steps

    def finish(self) -> str | None:
        """Say why training ended before its time."""
        if self._leave.reason is not None:
            raise self._leave.reason
        return None


def _measured_text(context: RunContext, parts: Iterable[RunPart]) -> MeasuredText:
    """What is measured on is read once, as the parts that measure ask."""
    measuring = next((part for part in parts if part.measured_splits), None)
    if measuring is None:
        return MeasuredText(context.args, context.facts, context.labels)
    splits, reason = measuring.measured_splits, measuring.measured_for
    return MeasuredText(context.args, context.facts, context.labels, splits, reason)


def run_kind(args: Namespace) -> str:
    """Which kind of run the flags ask for."""
    if args.inject_evaluate is not None:
        return EVALUATION
    if args.inject_profile is not None and args.skip_train:
        return PROFILE
    if args.inject_rollouts is not None:
        return GENERATION
    return INJECTION
