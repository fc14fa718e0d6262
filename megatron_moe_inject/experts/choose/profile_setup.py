"""Recording a routing profile: beside an injection, or in a run that only evaluates.

With ``--skip-train`` nothing is frozen, no teacher is loaded and the loss is stock: Megatron
evaluates, at any parallel layout, and the recorder watches. So a recipe may already name the
profile that such a run is to write.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_moe_inject.experts.choose.profile_file import write_profile
from megatron_moe_inject.experts.choose.recorder import RoutingRecorder
from megatron_moe_inject.experts.choose.router_logits import (
    MOST_BYTES,
    logit_path,
    most_tokens,
    write_logits,
)
from megatron_moe_inject.experts.choose.routing_profile import (
    GENERAL_CLASS,
    Provenance,
    RouterSettings,
    RoutingProfile,
)
from megatron_moe_inject.experts.train.census import parameter_rows
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.agreement import agree, on_first_rank
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.files import try_file
from megatron_moe_inject.host.labels import (
    GENERAL,
)
from megatron_moe_inject.host.model_parts import (
    EXPERTS,
)
from megatron_moe_inject.host.student_load import Origin
from megatron_moe_inject.host.text import (
    memory_text,
)
from megatron_moe_inject.recipe.entries import split_labels
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.schema import Recipe


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
                in_training=not self._args.skip_train,
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
