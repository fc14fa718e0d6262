"""Recording a routing profile: beside an injection, or in a run that only evaluates.

With ``--skip-train`` nothing is frozen, no teacher is loaded and the loss is stock: Megatron
evaluates, at any parallel layout, and the recorder watches. So a recipe may already name the
profile that such a run is to write.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject import compat
from megatron_moe_inject.data.labels import HostGroup
from megatron_moe_inject.data.mixing import mix_held_out
from megatron_moe_inject.experts.census import parameter_rows
from megatron_moe_inject.experts.freeze import EXPERTS
from megatron_moe_inject.experts.profile_file import write_profile
from megatron_moe_inject.experts.recorder import RoutingRecorder
from megatron_moe_inject.experts.router_logits import logit_path, write_logits
from megatron_moe_inject.experts.routing_profile import (
    GENERAL_CLASS,
    Provenance,
    RouterSettings,
    RoutingProfile,
)
from megatron_moe_inject.progress import StepProgress
from megatron_moe_inject.recipe import GENERAL, Recipe, RecipeError
from megatron_moe_inject.step import SplitRegistry, StepHook
from megatron_moe_inject.student import SPLITS, StudentFacts, split_labels, student_facts_from_args


class ProfileSetup:
    """What a profile needs to know besides what the recorder counts.

    Args:
        recipe: names the classes of data.
        args: Megatron's arguments.
        facts: the student.
        splits: which splits are recorded.

    Raises:
        RecipeError: a dense student, or a place that cannot be written to.
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
        self._names = [GENERAL_CLASS, *(domain.name for domain in recipe.domains)]
        self._data = [
            tuple(dict.fromkeys(e for split in splits for e in self._entries(recipe, split, label)))
            for label in (GENERAL, *range(len(recipe.domains)))
        ]

    def _entries(self, recipe: Recipe, split: str, label: int) -> list[str]:
        entries = (
            ["(mock data)"] if self._facts.mock_data else self._facts.data_paths.get(split, ())
        )
        found = split_labels(recipe, self._facts, split) if entries else []
        return [entry for entry, own in zip(entries, found, strict=True) if own == label]

    def recorder(self, chunks: Sequence[torch.nn.Module], groups: Any) -> RoutingRecorder:
        """The recorder of this rank.

        Collectives: those of ``parameter_rows``.
        """
        rows = parameter_rows(chunks, groups)
        experts = sum(row.trained + row.frozen for row in rows if row.component == EXPERTS)
        self._parameters = sum(row.trained + row.frozen for row in rows)
        count = len(self._facts.moe_layers) * self._facts.num_moe_experts
        self._expert_parameters = experts // count
        self._first_iteration = compat.optimizer_steps(self._args)
        return RoutingRecorder(
            chunks,
            len(self._names),
            groups,
            coselections=bool(self._args.inject_profile_coselections),
            logits=self._args.inject_profile_logits,
            sequence_length=self._args.seq_length,
        )

    def write(self, recorder: RoutingRecorder) -> str:
        """Write the profile on the first rank; what to say about it.

        Collectives: those of ``RoutingRecorder.statistics`` and ``sampled_logits``, one barrier.
        """
        found = recorder.statistics(self._data)
        sampled = recorder.sampled_logits()
        classes = {n: s for n, s in zip(self._names, found, strict=True) if s is not None}
        if not classes:
            return f"routing profile: no step was recorded, {self._path} is not written"
        args = self._args
        provenance = Provenance(
            checkpoint=str(args.load or ""),
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
        if dist.get_rank() == 0:
            logits = None
            if sampled is not None:
                samples = {n: s for n, s in zip(self._names, sampled, strict=True) if n in classes}
                logits = write_logits(self._path, samples)
            write_profile(self._path, RoutingProfile(provenance, classes, logits=logits))
        dist.barrier()
        counts = ", ".join(
            f"{name} {statistics.spread.sequences} sequences"
            for name, statistics in classes.items()
        )
        beside = ""
        if args.inject_profile_logits is not None:
            beside = f", router logits to {logit_path(self._path)}"
        return f"routing profile: {counts}, written to {self._path}{beside}"


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

    def __init__(self, recipe: Recipe, args: Namespace) -> None:
        self.dry_run = False
        if args.inject_dry_run:
            raise RecipeError(
                "--inject-dry-run: a run that only records a profile has no plan to show; leave "
                "out --skip-train or --inject-dry-run"
            )
        facts = student_facts_from_args(args)
        mix_held_out(recipe, args, facts)
        self.recipe = recipe
        self._args = args
        self._setup = ProfileSetup(recipe, args, facts, SPLITS[1:])
        self.splits = SplitRegistry({s: split_labels(recipe, facts, s) for s in SPLITS})
        self.step_hook: StepHook | None = None
        self._recorder: RoutingRecorder | None = None
        self._progress: StepProgress | None = None

    building = staticmethod(contextlib.nullcontext)
    """What surrounds the building of the student: nothing."""

    def freeze(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Nothing is frozen."""
        return chunks

    def attach(self, chunks: Sequence[torch.nn.Module], optimizer: Any = None) -> None:
        """Watch the routers of a student that is built and loaded.

        Collectives: group creation for the labels, and those of ``ProfileSetup.recorder``.
        """
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

    def end_training(self) -> str | None:
        """Never called: ``--skip-train``."""

    def finish(self) -> str:
        """Write the profile; see ``ProfileSetup.write``."""
        self._progress.close()
        return self._setup.write(self._recorder)
