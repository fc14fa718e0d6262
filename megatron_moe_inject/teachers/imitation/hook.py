"""Imitation of teacher layers at work in the student's model chunks, on any pipeline stage.

Forward hooks find the student's states where they arise and attach the loss to them, so that its
gradient joins the one that comes from above; no other stage is involved. A hidden state is what a
decoder layer hands on. The output of chosen experts is found by sending the expert outputs through
the token dispatcher a second time with the other experts' rows set to zero: its combine step is
linear, and its gradient crosses the expert-parallel ranks the same way.

Shapes: n micro-batches, b samples, l this rank's part of the sequence, h hidden, k samples of a
term's domains, E_l local experts, m rows that local experts process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.utils import make_viewless_tensor

from megatron_moe_inject.host.attached_loss import (
    add_reports,
    attach_loss,
    sum_and_count,
)
from megatron_moe_inject.host.clock import ChunkClock, Passages
from megatron_moe_inject.host.indices import index as positions
from megatron_moe_inject.host.megatron_types import Chunk, Groups, MegatronModule
from megatron_moe_inject.host.model_parts import (
    decoder_layers,
)
from megatron_moe_inject.host.own_tokens import OwnTokens
from megatron_moe_inject.host.step import Step, StepPart
from megatron_moe_inject.host.to_device import to_device
from megatron_moe_inject.host.wrap import Call, wrap_method
from megatron_moe_inject.losses.features import (
    feature_loss,
)
from megatron_moe_inject.teachers.imitation.exchange import (
    FeatureExchange,
    LayerStates,
    StepTargets,
)
from megatron_moe_inject.teachers.imitation.projections import Projections
from megatron_moe_inject.teachers.imitation.terms import ImitationTerm
from megatron_moe_inject.teachers.step_teachers import StepTeachers
from megatron_moe_inject.teachers.uses import COMBINED

REPORTED = {"hidden": "imitation loss", "experts": "expert imitation loss"}
FORMERLY = "feature loss"
"""What the log called an imitation loss in version 0.1; written too until the next one."""


class _Place(Passages):
    """A place in a chunk where losses are attached.

    Args:
        clock: the chunk's.
        terms: what is imitated here.
        projections: the chunk's.
    """

    def __init__(
        self, clock: ChunkClock, terms: Sequence[ImitationTerm], projections: Projections
    ) -> None:
        super().__init__(clock)
        self.terms = terms
        self.projections = projections


class _Part(NamedTuple):
    """What a term compares of a micro-batch.

    Attributes:
        states: ``[l, k, h]``.
        target: ``[l, k, h_t]``.
        weight: ``[l, k]``, how much a token counts.
        domains: of each of k.
    """

    states: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    domains: Sequence[int]


class ImitationHook(StepPart):
    """Computes and attaches the losses of one rank.

    Args:
        chunks: bare model chunks of this rank.
        projections: those of each chunk.
        terms: all terms; each is used where its layer is.
        exchange: brings the teachers' states.
        teachers: those of the step, begun before this part.
        taught: indices of the domains that each teacher teaches.
        weights_at: weight of each kind of term after that many optimiser steps.
        loss: one of ``losses.features.FEATURE_LOSSES``.
        domains: domain names by index.
        by_domain: also report each domain.
        groups: the student's ``ProcessGroupCollection``.
        in_rows: whether a micro-batch may be one row of several packed samples; the exchange then
            brings whole samples, on one pipeline stage.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        projections: Sequence[Projections],
        terms: Sequence[ImitationTerm],
        exchange: FeatureExchange,
        teachers: StepTeachers,
        *,
        taught: Mapping[str, Sequence[int]],
        weights_at: Callable[[int], Mapping[str, float]],
        loss: str,
        domains: Sequence[str],
        by_domain: bool,
        groups: Groups,
        in_rows: bool = False,
    ) -> None:
        self._in_rows = in_rows
        self._config = chunks[0].config
        self._tokens = OwnTokens(
            groups, sequence_parallel=self._config.sequence_parallel, packed=in_rows
        )
        self._device = next(chunks[0].parameters()).device
        self._exchange = exchange
        self._teachers = teachers
        self._taught = taught
        self._weights_at = weights_at
        self._loss = loss
        self._domains = domains
        self._by_domain = by_domain
        indices = {i for labels in taught.values() for i in labels}
        self._taught_domains = sorted(i for i in indices if i >= 0)
        self._kinds = sorted({term.kind for term in terms}, key=list(REPORTED).index)
        self._model_parallel = groups.mp
        self._counts_here = self._config.sequence_parallel or groups.tp.rank() == 0
        self._active = False
        self._clocks: list[ChunkClock] = []
        self._places: list[_Place] = []
        for chunk, chunk_projections in zip(chunks, projections, strict=True):
            clock = ChunkClock(chunk)
            self._clocks.append(clock)
            for layer in decoder_layers(chunk):
                layer_terms = [term for term in terms if term.layer == layer.layer_number - 1]
                self._watch(layer, layer_terms, clock, chunk_projections)

    def _watch(
        self,
        layer: MegatronModule,
        terms: list[ImitationTerm],
        clock: ChunkClock,
        own: Projections,
    ) -> None:
        hidden = [term for term in terms if term.kind == "hidden"]
        if hidden:
            place = _Place(clock, hidden, own)
            self._places.append(place)
            layer.register_forward_hook(functools.partial(self._after_layer, place))
        experts = [term for term in terms if term.kind == "experts"]
        if experts:
            place = _Place(clock, experts, own)
            self._places.append(place)
            _ExpertOutputs(layer.mlp, functools.partial(self._after_experts, place), self.is_active)

    def is_active(self) -> bool:
        """Whether a step with losses is under way."""
        return self._active

    def begin(self, step: Step) -> None:
        """Get the states of the step's teachers.

        Collectives: those of ``FeatureExchange.run``.
        """
        labels = step.labels
        counts = {
            teacher: int(torch.isin(labels, torch.tensor(indices)).sum())
            for teacher, indices in self._taught.items()
        }
        self._targets = self._exchange.run(
            self._teachers.passes,
            step.micro_batches,
            (labels.shape[0], labels.shape[1]),
            counts,
            step.sequence_length,
        )
        self._labels = labels.tolist()
        self._sums = torch.zeros(len(self._kinds), len(self._domains), 2, device=self._device)
        parts: list[ChunkClock | _Place] = [*self._clocks, *self._places]
        for part in parts:
            part.reset()
        self._scales = self._step_scales(step.iteration, self._targets)
        self._active = True

    def _step_scales(self, iteration: int, targets: StepTargets | None) -> dict[str, torch.Tensor]:
        """By kind, ``[n]``: what multiplies a micro-batch's sum over tokens, as in the main loss.

        Megatron divides that by the tokens and the micro-batches, or with
        ``calculate_per_token_loss`` at the end of the step by all tokens, and multiplies it by the
        optimizer's loss scale.
        """
        if targets is None:
            return {}
        scale = torch.ones(1, device=self._device)
        if self._config.grad_scale_func is not None and torch.is_grad_enabled():
            scale = self._config.grad_scale_func(scale)
        counts = torch.ones_like(targets.tokens)
        if not self._config.calculate_per_token_loss:
            counts = targets.tokens.clamp(min=1) * len(targets.tokens)
        weights = self._weights_at(iteration)
        return {kind: weights[kind] * scale.detach() / counts for kind in self._kinds}

    def end(self, step: Step, reports: Any) -> None:
        """Finish the step and add what was measured to what the schedule returned.

        Collectives: one all-reduce of a few numbers over the model-parallel group.
        """
        self._active = False
        self._targets = None
        if self._model_parallel.size() > 1:
            dist.all_reduce(self._sums, group=self._model_parallel)
        add_reports(reports, self._values())

    def _values(self) -> dict[str, torch.Tensor]:
        values = {}
        for kind, sums in zip(self._kinds, self._sums, strict=True):
            values[REPORTED[kind]] = sum_and_count(*sums.sum(0))
            for index in self._taught_domains if self._by_domain else ():
                values[f"{REPORTED[kind]}/{self._domains[index]}"] = sum_and_count(*sums[index])
        before = {n.replace("imitation loss", FORMERLY): value for n, value in values.items()}
        return values | before

    def _after_layer(self, place: _Place, layer: Any, args: Any, output: Any) -> Any:
        """Forward hook of a decoder layer, whose output is ``([l, b, h], context)``."""
        if not self._active:
            return None
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        micro_batch, first = place.passing()
        losses = [
            self._term_loss(place, term, hidden, micro_batch, first, None) for term in place.terms
        ]
        hidden = self._attach(hidden, losses)
        return (hidden, *rest) if isinstance(output, tuple) else hidden

    def _after_experts(
        self, place: _Place, output: torch.Tensor, combined: Callable[[frozenset[int]], Any]
    ) -> torch.Tensor:
        """At the end of a MoE layer; ``combined`` gives the output ``[l, b, h]`` of experts."""
        micro_batch, first = place.passing()
        losses = []
        for term in place.terms:
            states = combined(term.experts)
            reached = (states.detach() != 0).any(-1)
            losses.append(self._term_loss(place, term, states, micro_batch, first, reached))
        return self._attach(output, losses)

    def _attach(self, states: torch.Tensor, losses: list[torch.Tensor]) -> torch.Tensor:
        if not (torch.is_grad_enabled() and states.requires_grad):
            return states
        loss = torch.stack(losses).sum()
        # The schedule frees what it has sent, and refuses to free views.
        return make_viewless_tensor(
            attach_loss(states, loss, torch.ones_like(loss)), requires_grad=True, keep_graph=True
        )

    def _term_loss(
        self,
        place: _Place,
        term: ImitationTerm,
        states: torch.Tensor,
        micro_batch: int,
        first: bool,
        reached: torch.Tensor | None,
    ) -> torch.Tensor:
        """Weighted loss of a micro-batch's states ``[l, b, h]``; its sums are kept the first time.

        Without a sample of the term's domains it is 0 with a graph, so that every rank runs the
        same collectives backward and every projection gets a gradient.
        """
        targets = self._targets
        assert targets is not None, "a stage that imitates gets targets"
        find = self._part_in_row if self._in_rows else self._part
        part = find(targets, term, states, micro_batch, reached)
        student = place.projections.project(term, part.states)
        losses = feature_loss(student, part.target, self._loss)
        by_sample = (losses * part.weight).sum(0)
        if first and self._counts_here:
            index = positions(part.domains, self._device)
            both = torch.stack([by_sample.detach(), part.weight.sum(0)], dim=1)
            self._sums[self._kinds.index(term.kind)].index_add_(0, index, both)
        shares = torch.tensor([term.shares[domain] for domain in part.domains], dtype=torch.float32)
        return (by_sample * to_device(shares, self._device)).sum() * self._scales[term.kind][
            micro_batch
        ]

    def _part(
        self,
        targets: StepTargets,
        term: ImitationTerm,
        states: torch.Tensor,
        micro_batch: int,
        reached: torch.Tensor | None,
    ) -> _Part:
        """Of a micro-batch's states ``[l, b, h]`` the k samples that the term is about."""
        domains = self._labels[micro_batch]
        samples = [i for i, domain in enumerate(domains) if domain in term.shares]
        if len(samples) < len(domains):
            sample_index = positions(samples, states.device)
            states = states.index_select(1, sample_index)
            reached = None if reached is None else reached.index_select(1, sample_index)
        mask = targets.mask[micro_batch]
        weight = mask.index_select(0, positions(samples, mask.device)).t()
        readable = targets.readable.get(term.teacher)
        if readable is not None:
            weight = weight * self._of_samples(term, readable, micro_batch, samples).t()
        if reached is not None:
            weight = weight * reached
        target = self._target(targets, term, micro_batch, samples)
        return _Part(states, target, weight, [domains[i] for i in samples])

    def _part_in_row(
        self,
        targets: StepTargets,
        term: ImitationTerm,
        states: torch.Tensor,
        micro_batch: int,
        reached: torch.Tensor | None,
    ) -> _Part:
        """Of a row of packed samples the tokens that the term is about, k of one token each."""
        domains = self._labels[micro_batch]
        samples = [i for i, domain in enumerate(domains) if domain in term.shares]
        row = self._tokens.as_row(states).squeeze(1)
        sample, position = self._tokens.places_of_row(len(domains), len(row))
        taught = torch.tensor([domain in term.shares for domain in domains])
        own = taught[sample].nonzero().flatten()
        sample, position = sample[own], position[own]
        mask = targets.mask[micro_batch]
        length = mask.shape[1]

        def picked(tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            """Some of tokens ``[t, ...]``, ``[1, k, ...]``."""
            return tokens.index_select(0, to_device(at, tokens.device)).unsqueeze(0)

        weight = picked(mask.flatten(), sample * length + position)
        among_taught = (taught.cumsum(0) - 1)[sample] * length + position
        readable = targets.readable.get(term.teacher)
        if readable is not None:
            known = self._of_samples(term, readable, micro_batch, samples)
            weight = weight * picked(known.flatten(), among_taught)
        if reached is not None:
            weight = weight * picked(self._tokens.as_row(reached).squeeze(1), own)
        target = self._target(targets, term, micro_batch, samples).transpose(0, 1)
        target = picked(target.flatten(0, 1), among_taught)
        by_token = torch.tensor(domains)[sample].tolist()
        return _Part(picked(row, own), target, weight, by_token)

    def _target(
        self, targets: StepTargets, term: ImitationTerm, micro_batch: int, samples: Sequence[int]
    ) -> torch.Tensor:
        """The teacher's states of some samples of a micro-batch, ``[l, k, h_t]``."""
        states = targets.states[LayerStates(term.teacher, term.teacher_layer)]
        return self._of_samples(term, states, micro_batch, samples).transpose(0, 1)

    def _of_samples(
        self,
        term: ImitationTerm,
        states: torch.Tensor,
        micro_batch: int,
        samples: Sequence[int],
    ) -> torch.Tensor:
        """Of the step's ``[k, ...]`` that a teacher gives, some samples of a micro-batch."""
        taught = self._taught[term.teacher]
        before = sum(d in taught for labels in self._labels[:micro_batch] for d in labels)
        order = [i for i, d in enumerate(self._labels[micro_batch]) if d in taught]
        states = states[before : before + len(order)]
        if order != list(samples):
            places = positions((order.index(sample) for sample in samples), states.device)
            states = states.index_select(0, places)
        return states


class _ExpertOutputs:
    """Watches one MoE layer and can combine the outputs of some of its experts.

    Args:
        layer: Megatron's ``MoELayer``.
        finish: gets the layer's output and the function that combines; returns the output.
        is_active: whether to do so now.
    """

    def __init__(
        self,
        layer: MegatronModule,
        finish: Callable[[torch.Tensor, Callable[[frozenset[int]], Any]], torch.Tensor],
        is_active: Callable[[], bool],
    ) -> None:
        self._layer = layer
        self._finish = finish
        self._is_active = is_active
        self._processed: tuple[torch.Tensor, Any] | None = None
        layer.experts.register_forward_hook(self._keep, with_kwargs=True)
        wrap_method(layer, COMBINED, self._postprocess)

    def _keep(self, experts: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the experts, which return their rows and a bias."""
        if self._is_active():
            counts = kwargs["tokens_per_expert"] if len(args) < 2 else args[1]
            self._processed = output[0], counts

    def _postprocess(self, call: Call) -> torch.Tensor:
        output = call()
        if self._processed is None:
            return output
        outputs, tokens_per_expert = self._processed
        self._processed = None
        return self._finish(output, functools.partial(self._combined, outputs, tokens_per_expert))

    def _combined(
        self, outputs: torch.Tensor, tokens_per_expert: Any, experts: frozenset[int]
    ) -> torch.Tensor:
        """Combined output of ``experts``, from all rows ``[m, h]`` in the order of local experts.

        Collectives: those of the dispatcher's combine step.
        """
        local = self._layer.local_expert_indices
        chosen = to_device(torch.tensor([expert in experts for expert in local]), outputs.device)
        counts = to_device(torch.as_tensor(tokens_per_expert), outputs.device)
        rows = chosen.repeat_interleave(counts, output_size=len(outputs))
        dispatcher = self._layer.token_dispatcher
        prepared = dispatcher.combine_preprocess(outputs * rows.unsqueeze(1).to(outputs.dtype))
        return dispatcher.combine_postprocess(dispatcher.token_combine(prepared))
