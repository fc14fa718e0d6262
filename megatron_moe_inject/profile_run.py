"""Recording a routing profile: beside an injection, or in a run that only evaluates.

With ``--skip-train`` nothing is frozen, no teacher is loaded and the loss is stock: Megatron
evaluates, at any parallel layout, and the recorder watches. So a recipe may already name the
profile that such a run is to write.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject import compat
from megatron_moe_inject.agreement import agree, on_first_rank
from megatron_moe_inject.data.labels import HostGroup
from megatron_moe_inject.data.mixing import mix_held_out
from megatron_moe_inject.data.packed import check_packed
from megatron_moe_inject.data.read_once import MeasuredText
from megatron_moe_inject.experts.census import parameter_rows
from megatron_moe_inject.experts.freeze import EXPERTS
from megatron_moe_inject.experts.profile_file import write_profile
from megatron_moe_inject.experts.recorder import RoutingRecorder
from megatron_moe_inject.experts.router_logits import (
    MOST_BYTES,
    logit_path,
    most_tokens,
    write_logits,
)
from megatron_moe_inject.experts.routing_profile import (
    GENERAL_CLASS,
    Provenance,
    RouterSettings,
    RoutingProfile,
)
from megatron_moe_inject.files import try_file
from megatron_moe_inject.plan import memory_text
from megatron_moe_inject.progress import StepProgress
from megatron_moe_inject.recipe import GENERAL, Recipe, RecipeError
from megatron_moe_inject.step import SplitRegistry, StepHook
from megatron_moe_inject.student import SPLITS, StudentFacts, split_labels, student_facts_from_args
from megatron_moe_inject.student_load import Origin, StudentLoad


class ProfileSetup:
    """What a profile needs to know besides what the recorder counts.

    Args:
        recipe: names the classes of data.
        args: Megatron's arguments.
        facts: the student.
        splits: which splits are recorded.

    Attributes:
        origin: what was loaded, to be set before ``recorder``.

    Raises:
        RecipeError: a dense student, a place that cannot be written to, or more router logits
            than there is room for.
    """

    def __init__(
        self, recipe: Recipe, args: Namespace, facts: StudentFacts, splits: Sequence[str]
    ) -> None:
        self._args = args
        self._facts = facts
        self._path = Path(args.inject_profile)
        if not facts.moe_layers:
            raise RecipeError("--inject-profile: the student has no routers (no --num-experts)")
        if not self._path.absolute().parent.is_dir():
            raise RecipeError(
                f"--inject-profile: {self._path.absolute().parent} is no folder; create it first"
            )
        self.origin = Origin()
        self._names = [GENERAL_CLASS, *(domain.name for domain in recipe.domains)]
        self._check_logits()
        self._data = [
            tuple(dict.fromkeys(e for split in splits for e in self._entries(recipe, split, label)))
            for label in (GENERAL, *range(len(recipe.domains)))
        ]

    def _check_logits(self) -> None:
        asked = self._args.inject_profile_logits
        layers, experts = len(self._facts.moe_layers), self._facts.num_moe_experts
        most = most_tokens(classes=len(self._names), layers=layers, experts=experts)
        if asked is not None and asked > most:
            raise RecipeError(
                f"--inject-profile-logits: {asked} tokens of each of {len(self._names)} classes, "
                f"in {layers} layers with {experts} experts, are more than "
                f"{memory_text(MOST_BYTES)}; write {most} or less"
            )

    def _entries(self, recipe: Recipe, split: str, label: int) -> list[str]:
        entries = (
            ["(mock data)"] if self._facts.mock_data else self._facts.data_paths.get(split, ())
        )
        found = split_labels(recipe, self._facts, split) if entries else []
        return [entry for entry, own in zip(entries, found, strict=True) if own == label]

    def try_output(self) -> None:
        """See that the profile, and what goes beside it, can be written; on the first rank.

        Raises:
            RecipeError: it cannot.
        """
        beside = [] if self._args.inject_profile_logits is None else [logit_path(self._path)]
        for path in (self._path, *beside):
            try_file(path, "--inject-profile")

    def recorder(self, chunks: Sequence[torch.nn.Module], groups: Any) -> RoutingRecorder:
        """The recorder of this rank.

        Collectives: those of ``parameter_rows`` and ``agree``.

        Raises:
            RecipeError: what is to be kept does not fit into some rank's memory.
        """
        rows = parameter_rows(chunks, groups)
        experts = sum(row.trained + row.frozen for row in rows if row.component == EXPERTS)
        self._parameters = sum(row.trained + row.frozen for row in rows)
        count = len(self._facts.moe_layers) * self._facts.num_moe_experts
        self._expert_parameters = experts // count
        self._first_iteration = compat.optimizer_steps(self._args)
        if self._args.skip_train and self.origin.iteration is not None:
            self._first_iteration = self.origin.iteration  # also where --finetune counts from 0
        return agree(
            lambda: RoutingRecorder(
                chunks,
                len(self._names),
                groups,
                coselections=bool(self._args.inject_profile_coselections),
                logits=self._args.inject_profile_logits,
                sequence_length=self._args.seq_length,
            )
        )

    def write(self, recorder: RoutingRecorder, repeated: Collection[int] = ()) -> str:
        """Write the profile on the first rank; what to say about it.

        Args:
            repeated: labels of classes whose text was read more than once, so that its sequences
                are not as many as they seem: they get no spread. Needed on the first rank.

        Collectives: those of ``RoutingRecorder.statistics``, ``sampled_logits`` and
        ``on_first_rank``.

        Raises:
            RecipeError: on every rank: it cannot be written.
        """
        found = recorder.statistics(self._data)
        sampled = recorder.sampled_logits()
        classes = {n: s for n, s in zip(self._names, found, strict=True) if s is not None}
        counts = ", ".join(f"{n} {s.spread.sequences} sequences" for n, s in classes.items())
        again = [self._names[label + 1] for label in sorted(repeated)]
        again = [name for name in again if name in classes]
        classes |= {name: replace(classes[name], spread=None) for name in again}
        if not classes:
            return f"routing profile: no step was recorded, {self._path} is not written"
        args = self._args
        provenance = Provenance(
            checkpoint=self.origin.checkpoint,
            checkpoint_iteration=self.origin.iteration,
            checkpoint_sha256=self.origin.sha256,
            first_iteration=self._first_iteration,
            last_iteration=self._first_iteration + (0 if args.skip_train else recorder.steps),
            megatron_version=compat.megatron_version(),
            sequence_length=args.seq_length,
            num_layers=self._facts.num_layers,
            moe_layers=list(self._facts.moe_layers),
            parameters=self._parameters,
            expert_parameters=self._expert_parameters,
            router=RouterSettings(
                num_moe_experts=self._facts.num_moe_experts,
                topk=args.moe_router_topk,
                score_function=args.moe_router_score_function,
                pre_softmax=bool(args.moe_router_pre_softmax),
                num_groups=args.moe_router_num_groups,
                group_topk=args.moe_router_group_topk,
                enable_expert_bias=bool(args.moe_router_enable_expert_bias),
                topk_scaling_factor=args.moe_router_topk_scaling_factor,
                expert_capacity_factor=args.moe_expert_capacity_factor,
            ),
        )

        def write() -> None:
            logits = None
            if sampled is not None:
                samples = {n: s for n, s in zip(self._names, sampled, strict=True) if n in classes}
                logits = write_logits(self._path, samples)
            write_profile(self._path, RoutingProfile(provenance, classes, logits=logits))

        try:
            on_first_rank(write)
        except RecipeError as error:
            raise RecipeError(f"--inject-profile: {error}") from error
        beside = ""
        if args.inject_profile_logits is not None:
            beside = f", router logits to {logit_path(self._path)}"
        said = f"routing profile: {counts}, written to {self._path}{beside}"
        for name in again:
            said += f"\nrouting profile: {name} was read more than once, so it has no spread"
        return said


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
        self.step_hook = StepHook(
            self.splits,
            HostGroup.create(groups.mp),
            None,
            lambda: compat.optimizer_steps(self._args),
            recorder=self._recorder,
            records_evaluation=True,
        )
        self._progress = StepProgress(dist.get_rank())
        self.step_hook.after_step = lambda: self._progress.step(self._steps())

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
