"""Freezing in a run: the policy, where backward stops, and the proof of what did not change."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_moe_inject.experts.train.boundary import GradientBoundary, agree_boundary
from megatron_moe_inject.experts.train.census import ParameterRow, parameter_rows, parameter_table
from megatron_moe_inject.experts.train.delayed import ask_no_frozen_layer
from megatron_moe_inject.experts.train.freeze import FreezePolicy
from megatron_moe_inject.experts.train.frozen_fp8 import drop_transposes
from megatron_moe_inject.experts.train.grouped import train_grouped_experts
from megatron_moe_inject.experts.train.optimizer_state import make_checkpointable
from megatron_moe_inject.experts.train.pipeline import (
    agree_forward_stages,
    boundary_step,
    gets_no_graph,
)
from megatron_moe_inject.experts.train.planned import PlannedBoundary
from megatron_moe_inject.experts.train.policy import freeze_policy, frozen_fp8
from megatron_moe_inject.experts.train.resume import begin_or_resume
from megatron_moe_inject.experts.train.verify import FrozenChangedError, FrozenCheck
from megatron_moe_inject.host.agreement import agree, union
from megatron_moe_inject.host.errors import RecipeError, fail
from megatron_moe_inject.host.model_parts import COMPONENTS, places
from megatron_moe_inject.host.schedule_plan import runs_by_plan
from megatron_moe_inject.host.step import StepPart
from megatron_moe_inject.recipe.run_part import Boundary, BuiltStudent, RunContext, RunPart


@dataclass(frozen=True)
class Census:
    """How many parameters train, by component."""

    rows: Sequence[ParameterRow]


class FreezingPart(RunPart):
    """Provides ``FreezePolicy``, and once attached ``Boundary`` and ``Census``."""

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self._policy = freeze_policy(run.recipe)
        run.provide(FreezePolicy, self._policy)
        self._fp8 = frozen_fp8(run.recipe, self._policy, run.facts)
        self._check: FrozenCheck | None = None
        self._chunks: Sequence[torch.nn.Module] = ()
        if not self._policy.everything:
            self.around = {
                "get_megatron_optimizer": lambda stock, *a, **k: make_checkpointable(stock(*a, **k))
            }

    def prepare(self) -> None:
        """Compare what trains with the checkpoint that is to be loaded; see ``resume``."""
        besides = {name: what for part in self._run.parts for name, what in part.trains().items()}
        remark = begin_or_resume(self._policy, self._run.args, besides)
        self._run.warnings += [] if remark is None else [remark]

    def building(self) -> contextlib.AbstractContextManager[Any]:
        """Experts that are kept in FP8 alone are encoded layer by layer while Megatron builds."""
        return contextlib.nullcontext() if self._fp8 is None else self._fp8.while_building()

    def before_ddp(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Apply the policy, and tell layers that make gradients in their own way what is frozen."""
        if self._policy.everything:
            return
        self._policy.apply(list(chunks))
        train_grouped_experts(list(chunks))
        drop_transposes(list(chunks))
        ask_no_frozen_layer(list(chunks))

    def attach(self, student: BuiltStudent) -> StepPart | None:
        """Agree on where backward stops, and let it: nowhere, where everything trains.

        Collectives: over the whole world those of ``agree`` with FP8, one all-gather of pattern
        lists where there are any, one all-reduce and one all-gather; over the pipeline one
        all-gather.

        Raises:
            RecipeError: on every rank: nothing trains, or a pattern names nothing.
        """
        self._chunks, pp = student.chunks, student.groups.pp
        if self._policy.everything:
            self._run.provide(Boundary, Boundary(-1, 0))
            self._census = Census(parameter_rows(student.chunks, student.groups))
            self._run.provide(Census, self._census)
            return None
        if self._fp8 is not None:
            agree(self._fp8.check)
        self._check_patterns()
        position = agree_boundary(student.chunks, self._run.facts.num_layers, student.device)
        planned = runs_by_plan(student.chunks[0])
        stages = 0 if planned else agree_forward_stages(student.chunks, position, pp)
        self._boundary = Boundary(position, stages)
        self._run.provide(Boundary, self._boundary)
        for i, chunk in enumerate(student.chunks):
            if planned:
                PlannedBoundary(chunk, position)
            else:
                GradientBoundary(chunk, position, cut=gets_no_graph(i, stages, pp))
        self._census = Census(parameter_rows(student.chunks, student.groups))
        self._run.provide(Census, self._census)
        return None

    def plan_lines(self, given: Mapping[str, list[str]]) -> Mapping[str, list[str]]:
        """With the parameters counted, and where backward stops."""
        first, *rest = given["trains"]
        if self._policy.everything:
            return {"trains": [first, *parameter_table(self._census.rows), *rest]}
        stops = f"backward stops at layer {self._boundary.position}; below it only the forward runs"
        return {"trains": [first, *parameter_table(self._census.rows), *rest, stops]}

    def begin_training(self) -> None:
        """Remember what must not change, if ``verify_frozen`` asks for the proof."""
        if self._run.recipe.verify_frozen:
            self._check = FrozenCheck(self._chunks, self._policy, self._policy.rows)

    def finish(self) -> str | None:
        """Prove it.

        Collectives: those of ``FrozenCheck.verify``.

        Raises:
            RecipeError: on every rank: something changed.
        """
        if self._check is None:
            return None
        try:
            return self._check.verify()
        except FrozenChangedError as error:
            raise RecipeError(str(error)) from error

    def _check_patterns(self) -> None:
        """Every pattern of ``train.patterns`` must name a parameter of some rank, and none one
        that pipeline stages share.

        Collectives: one all-reduce of a byte for each pattern and component over the whole world,
        where there are any.
        """
        if not self._policy.patterns:
            return
        everywhere = [at for chunk in self._chunks for at, _ in places(chunk)]
        pairs = list(itertools.product(self._policy.patterns, COMPONENTS))
        places_of_pairs = {pair: number for number, pair in enumerate(pairs)}
        matched = {
            places_of_pairs[p, at.component] for at in everywhere for p in self._policy.matches(at)
        }
        found = {pairs[number] for number in union(matched, len(pairs))}
        for i, pattern in enumerate(self._policy.patterns):
            components = {kind for p, kind in found if p == pattern}
            if self._run.facts.tied_embeddings and components & {"embedding", "output_layer"}:
                raise fail(
                    f"train.patterns[{i}]", pattern, "names the matrix that embedding and output "
                    "layer share", "set train.embedding and train.output_layer instead",
                )  # fmt: skip
            if not components:
                raise fail(
                    f"train.patterns[{i}]", pattern, "matches no parameter of the student",
                    "names look like decoder.layers.3.mlp.experts.17.linear_fc1.weight",
                )  # fmt: skip


class ForwardStagesPart(RunPart):
    """Lets the leading stages run forward only."""

    def __init__(self, run: RunContext) -> None:
        self._run = run

    def attach(self, student: BuiltStudent) -> StepPart | None:
        """No collective."""
        stages = self._run.need(Boundary).forward_stages
        return boundary_step(student.chunks, stages, student.groups.pp)
