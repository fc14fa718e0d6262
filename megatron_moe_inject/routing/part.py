"""From a recipe to what is steered: the targets, whether it acts, and the parts of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_moe_inject.data.packed import check_packed, packing_flag
from megatron_moe_inject.host.agreement import union
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.megatron_types import Chunk
from megatron_moe_inject.host.model_parts import (
    decoder_layers,
    routers,
)
from megatron_moe_inject.host.new_experts import card_of_run
from megatron_moe_inject.host.original_values import OriginalValues
from megatron_moe_inject.host.routing_watch import (
    RoutingWatch,
)
from megatron_moe_inject.host.run_arguments import (
    stored_argument,
)
from megatron_moe_inject.host.step import Step, StepPart
from megatron_moe_inject.recipe.run_part import Boundary, BuiltStudent, RunContext, RunPart
from megatron_moe_inject.recipe.schedule import value_at
from megatron_moe_inject.routing.section import STEERING, weighed_by_mean, weighed_by_token
from megatron_moe_inject.routing.shares import RoutingShares
from megatron_moe_inject.routing.steering import SteeringHook, SteeringWeights
from megatron_moe_inject.teachers.confidence import RunningConfidence
from megatron_moe_inject.teachers.step_teachers import StepTeachers

KEPT = "inject_confidence"
"""Where Megatron's arguments, and so its checkpoints, keep the running means."""


class RoutingStep(StepPart):
    """What a step does about routing: its losses, then its reports.

    Args:
        hook: attaches losses; ``None`` where the log alone is wanted.
        shares: reports where tokens go; ``None`` where no domain has targets.
        teachers: those of the step, begun before this part.
        confidence: what weighs single tokens, ``none`` or see ``teachers.confidence.confidences``.
        running: what weighs the tokens of the domains whose teachers run by windows.
    """

    reads_tokens = True

    def __init__(
        self,
        hook: SteeringHook | None,
        shares: RoutingShares | None,
        teachers: StepTeachers,
        confidence: str = "none",
        running: RunningConfidence | None = None,
    ) -> None:
        self._teachers = teachers
        self._confidence = confidence
        self._running = running
        self._hook = hook
        self._shares = shares

    def begin(self, step: Step) -> None:
        """Start a step; see ``SteeringHook.begin``.

        Collectives: those of ``StepTeachers.confidences`` on the last stage, and of
        ``SteeringHook.begin``.
        """
        confidence = means = None
        if self._confidence != "none" and self._teachers.passes:
            confidence = self._teachers.confidences(self._confidence, step.labels)
        if self._running is not None:
            self._running.begin(step.iteration)
            means = self._running.means
        if self._hook is not None:
            self._hook.begin(
                step.labels,
                step.iteration,
                step.sequence_length,
                confidence,
                means,
                step.loss_mask,
            )
        if self._shares is not None:
            self._shares.begin(step.labels, step.loss_mask)

    def end(self, step: Step, reports: Any) -> None:
        """Finish the step.

        Collectives: those of ``SteeringHook.end`` and ``RoutingShares.end``, and after a step of
        training those of ``RunningConfidence.end``.
        """
        if self._running is not None and step.training:
            assert self._hook is not None, "running means weigh what it attaches"
            self._running.end(self._hook.device)
        if self._hook is not None:
            self._hook.end(reports)
        if self._shares is not None:
            self._shares.end(reports, step.iteration + 1 if step.training else None)


class SteeringPart(RunPart):
    """What a recipe asks of the routers; provides ``RunningConfidence`` where teachers run by
    windows and weigh tokens."""

    def __init__(self, run: RunContext) -> None:
        check_packed(run.args, run.largest_micro_batch, "steering")
        self._run = run
        self._recipe = run.recipe
        self._spec = run.recipe[STEERING]
        self._running: RunningConfidence | None = None
        self._targets: dict[int, torch.Tensor] = {}
        facts = run.facts
        card = card_of_run(run.args)
        added = {} if card is None else card.new
        trained = {} if card is None else card.among(run.recipe.experts_by_layer())
        self._added = {layer: self._these(ids) for layer, ids in added.items()}
        self._new = {layer: self._these(ids) for layer, ids in trained.items()}
        for index, domain in enumerate(run.recipe.domains):
            for layer, ids in domain.experts.layers.items():
                if self._spec.watches and (layer in self._spec.layers or not self._spec.layers):
                    table = self._targets.setdefault(layer, self._no_targets())
                    table[index + 1, ids] = True
        if self._spec.retains:
            for layer in facts.moe_layers:
                self._targets.setdefault(layer, self._no_targets())

    def _these(self, ids: Sequence[int]) -> torch.Tensor:
        """Bool ``[E]``."""
        these = torch.zeros(self._experts, dtype=torch.bool)
        these[list(ids)] = True
        return these

    def _no_targets(self) -> torch.Tensor:
        return torch.zeros(len(self._recipe.domains) + 1, self._experts, dtype=torch.bool)

    @property
    def _experts(self) -> int:
        experts = self._run.facts.num_moe_experts
        assert experts is not None, "a dense student has neither targets nor MoE layers"
        return experts

    def prepare(self) -> None:
        """Let running means of confidence begin, or go on from the checkpoint that is loaded; they
        are kept in ``args``, which Megatron stores. No collective.

        Raises:
            RecipeError: what is stored is damaged.
        """
        weighed, args = weighed_by_mean(self._recipe), self._run.args
        if not weighed:
            return
        names = {i: d.name for i, d in enumerate(self._recipe.domains) if d.name in weighed}
        kind = self._spec.confidence
        folder, stored = stored_argument(args, KEPT)
        stored = stored or {}
        state = stored.get("means", {}) if stored.get("kind") == kind else {}

        def keep(means: dict[str, list[float]]) -> None:
            setattr(args, KEPT, {"kind": kind, "means": means})

        try:
            self._running = RunningConfidence(kind, names, state, keep)
        except (TypeError, ValueError, LookupError) as error:
            raise RecipeError(
                f"steering.confidence: {folder} holds damaged means of it ({error}); load another "
                "checkpoint, or set steering.confidence: none"
            ) from error
        keep(self._running.state)
        self._run.provide(RunningConfidence, self._running)
        new = [name for name in weighed if name not in state]
        if folder is not None and new:
            self._run.warnings.append(
                f"steering.confidence: {folder} holds no mean {kind} confidence in "
                f"{' and '.join(new)}, which begins anew at 1"
            )

    def attach(self, student: BuiltStudent) -> RoutingStep | None:
        """The parts of this rank.

        Collectives: one all-gather of layer numbers over the whole world.

        Raises:
            RecipeError: steering would act on nothing.
        """
        if not (self._targets or self._added):
            return None
        spec, run, chunks, groups = self._spec, self._run, student.chunks, student.groups
        teachers = run.need(StepTeachers)
        if spec.steers:
            self._check_acts(chunks, run.need(Boundary).position)
        by_token = bool(weighed_by_token(self._recipe))
        weighed = [*weighed_by_token(self._recipe), *weighed_by_mean(self._recipe)]
        hook, confidence = None, spec.confidence if by_token else "none"
        packed = packing_flag(run.args) is not None
        if spec.steers or spec.retains:
            hook = SteeringHook(
                chunks,
                groups,
                self._targets,
                self._weights_at,
                target_mass=spec.target_mass,
                original=run.need(OriginalValues).of if spec.retains else None,
                stock_balance=spec.stock_balance == "all",
                bias_counts=spec.bias_counts,
                new=self._new,
                weighs={
                    i: domain.name
                    for i, domain in enumerate(self._recipe.domains)
                    if domain.name in weighed
                },
                by_token=by_token,
                packed=packed,
            )
        if not (self._added or any(table.any() for table in self._targets.values())):
            return RoutingStep(hook, None, teachers)
        shares = RoutingShares(
            RoutingWatch(chunks, groups, packed=packed),
            [domain.name for domain in self._recipe.domains],
            self._targets,
            self._added,
            groups,
            device=student.device,
            drops=chunks[0].config.moe_expert_capacity_factor is not None,
            detail_every=spec.detail_every,
            write=write_details,
        )
        return RoutingStep(hook, shares, teachers, confidence, self._running)

    def _weights_at(self, iteration: int) -> SteeringWeights:
        spec = self._spec
        return SteeringWeights(
            *(value_at(weight, iteration) for weight in (spec.coeff, spec.balance, spec.retention))
        )

    def _check_acts(self, chunks: Sequence[Chunk], boundary: int) -> None:
        """Steering acts where a router trains, or where what trains changes its input."""
        layers = {layer for chunk in chunks for layer in _acting(chunk, boundary)}
        acting = union(layers, chunks[0].config.num_layers)
        steered = {layer for layer, table in self._targets.items() if table.any()}
        if not steered & acting:
            raise RecipeError(
                f"steering.coeff: {self._spec.coeff} steers layers {sorted(steered)}, but neither "
                "their routers train nor anything below them; set train.router: true, or remove it"
            )
        if steered - acting:
            self._run.warnings.append(
                f"steering acts on nothing in layers {sorted(steered - acting)}: neither their "
                "routers train nor anything below them"
            )


def _acting(chunk: Chunk, boundary: int) -> set[int]:
    """Layers of a chunk whose router's logits depend on something that trains."""
    layers = {layer.layer_number - 1: layer for layer in decoder_layers(chunk)}
    acting = set()
    for number, router in routers(chunk):
        before = (
            parameter
            for name, parameter in layers[number].named_parameters()
            if not name.startswith("mlp.")
        )
        trained = any(p.requires_grad for p in (*router.parameters(), *before))
        if trained or boundary < number:
            acting.add(number)
    return acting


def write_details(scalars: Mapping[str, float], iteration: int) -> None:
    """To TensorBoard and W&B, on the rank that has them."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    writer, wandb = get_tensorboard_writer(), get_wandb_writer()
    if writer is not None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if wandb is not None:
        wandb.log(dict(scalars), iteration)
