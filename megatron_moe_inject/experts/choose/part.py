"""Recording a routing profile: beside an injection, or in a run that only evaluates.

With ``--skip-train`` nothing is frozen, no teacher is loaded and the loss is stock: Megatron
evaluates, at any parallel layout, and the recorder watches. So a recipe may already name the
profile that such a run is to write.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_moe_inject.data.packed import (
    check_packed,
    check_whole_documents,
    packing_flag,
)
from megatron_moe_inject.data.read_once import MeasuredText
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
from megatron_moe_inject.host.new_experts import card_of_run
from megatron_moe_inject.host.text import (
    memory_text,
)
from megatron_moe_inject.recipe.entries import SPLITS
from megatron_moe_inject.recipe.run_kinds import PROFILE
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext, RunPart

_FLAG = "--inject-profile"


class ProfilePart(RunPart):
    """Records, and writes the profile when all is done; provides ``RoutingRecorder``.

    Raises:
        RecipeError: a dense student, a place that cannot be written to, or more router logits
            than there is room for.
    """

    writes_about = True

    def __init__(self, run: RunContext) -> None:
        check_packed(run.args, run.largest_micro_batch, _FLAG)
        self._run = run
        self._args = args = run.args
        self._facts = facts = run.facts
        recipe = run.recipe
        splits: tuple[str, ...] = SPLITS[:1]
        if run.kind == PROFILE:
            splits = self.measured_splits = SPLITS[1:]
            self.measured_for = _FLAG
        self._path = Path(args.inject_profile)
        if not facts.moe_layers or facts.num_moe_experts is None:
            raise RecipeError(f"{_FLAG}: the student has no routers (no --num-experts)")
        self._experts = facts.num_moe_experts
        card = card_of_run(args)
        self._new_experts = None if card is None else card.new
        self._names = [GENERAL_CLASS, *(domain.name for domain in recipe.domains)]
        self._check_logits()
        self._data = [
            tuple(dict.fromkeys(e for split in splits for e in self._entries(split, label)))
            for label in (GENERAL, *range(len(recipe.domains)))
        ]

    def _check_logits(self) -> None:
        tokens, flag = self._args.inject_profile_logits, "--inject-profile-logits"
        if tokens is not None:
            check_whole_documents(self._args, flag)
        layers, experts = len(self._facts.moe_layers), self._experts
        most = most_tokens(classes=len(self._names), layers=layers, experts=experts)
        if tokens is not None and tokens > most:
            raise RecipeError(
                f"--inject-profile-logits: {tokens} tokens of each of {len(self._names)} classes, "
                f"in {layers} layers with {experts} experts, are more than "
                f"{memory_text(MOST_BYTES)}; write {most} or less"
            )

    def _entries(self, split: str, label: int) -> list[str]:
        paths = self._facts.data_paths.get(split, ())
        entries = ["(mock data)"] if self._facts.mock_data else paths
        if not entries:
            return []
        labels = self._run.labels[split]
        return [
            entry
            for entry, entry_label in zip(entries, labels, strict=True)
            if entry_label == label
        ]

    def try_outputs(self) -> None:
        """The first rank writes the profile, and what goes beside it."""
        beside = [] if self._args.inject_profile_logits is None else [logit_path(self._path)]
        for path in (self._path, *beside) if dist.get_rank() == 0 else ():
            try_file(path, _FLAG)

    def attach(self, student: BuiltStudent) -> RoutingRecorder:
        """The recorder of this rank.

        Collectives: those of ``parameter_rows`` and ``agree``.

        Raises:
            RecipeError: what is to be kept does not fit into some rank's memory.
        """
        chunks, groups = student.chunks, student.groups
        rows = parameter_rows(chunks, groups)
        experts = sum(row.trained + row.frozen for row in rows if row.component == EXPERTS)
        self._parameters = sum(row.trained + row.frozen for row in rows)
        count = len(self._facts.moe_layers) * self._experts
        self._expert_parameters = experts // count
        self._first_iteration = compat.optimizer_steps(self._args)
        if self._args.skip_train and self._run.origin.iteration is not None:
            self._first_iteration = (
                self._run.origin.iteration
            )  # also where --finetune counts from 0
        self._recorder = agree(
            lambda: RoutingRecorder(
                chunks,
                len(self._names),
                groups,
                coselections=bool(self._args.inject_profile_coselections),
                logits=self._args.inject_profile_logits,
                sequence_length=self._args.seq_length,
                in_training=not self._args.skip_train,
                packed=packing_flag(self._args) is not None,
            )
        )
        return self._recorder

    def finish(self) -> str:
        """Write the profile on the first rank; what to say about it.

        Classes whose training text was read more than once have not as many sequences as it
        seems, and get no spread.

        Collectives: those of ``RoutingRecorder.statistics``, ``sampled_logits`` and
        ``on_first_rank``.

        Raises:
            RecipeError: on every rank: it cannot be written.
        """
        recorder, repeated = self._recorder, set[int]()
        if self._run.kind != PROFILE:
            repeated = self._run.need(MeasuredText).repeated_in_training()
        statistics = recorder.statistics(self._data)
        sampled = recorder.sampled_logits()
        classes = {n: s for n, s in zip(self._names, statistics, strict=True) if s is not None}
        counts = ", ".join(f"{n} {s.spread.sequences} sequences" for n, s in classes.items())
        again = [self._names[label + 1] for label in sorted(repeated)]
        again = [name for name in again if name in classes]
        classes |= {name: replace(classes[name], spread=None) for name in again}
        if not classes:
            return f"routing profile: no step was recorded, {self._path} is not written"
        args = self._args
        provenance = Provenance(
            checkpoint=self._run.origin.checkpoint,
            checkpoint_iteration=self._run.origin.iteration,
            checkpoint_sha256=self._run.origin.sha256,
            first_iteration=self._first_iteration,
            last_iteration=self._first_iteration + (0 if args.skip_train else recorder.steps),
            megatron_version=compat.megatron_version(),
            sequence_length=args.seq_length,
            num_layers=self._facts.num_layers,
            moe_layers=list(self._facts.moe_layers),
            hybrid_layer_pattern=None if self._facts.pattern is None else self._facts.pattern.text,
            parameters=self._parameters,
            expert_parameters=self._expert_parameters,
            new_experts=self._new_experts,
            router=RouterSettings(
                num_moe_experts=self._experts,
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
            raise RecipeError(f"{_FLAG}: {error}") from error
        beside = ""
        if args.inject_profile_logits is not None:
            beside = f", router logits to {logit_path(self._path)}"
        message = f"routing profile: {counts}, written to {self._path}{beside}"
        if self._new_experts is not None:
            layers = provenance.moe_layers
            shares = [
                f"{n} {s.share_of(self._new_experts, layers):.2%}" for n, s in classes.items()
            ]
            message += f"\nrouting profile: choices that go to new experts: {', '.join(shares)}"
        for name in again:
            message += f"\nrouting profile: {name} was read more than once, so it has no spread"
        return message
