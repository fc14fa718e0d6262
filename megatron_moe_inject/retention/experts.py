"""Expert-output retention: an expert that trains stays near its original on general tokens.

The rows that an expert gets for general tokens run through it twice more, as it is and, without a
graph, as it was, both on the same rows, so that the difference is exactly 0 where nothing has been
trained. States and gates are constants there: only the layer's own experts learn from it. The loss
is attached to what the experts put out, so it needs no pass of the model and no place of its own
in the schedule.

Which rows are of general tokens is known where tokens are routed, by their sample, and is needed
where experts are. It travels in the sign of the gates, which every dispatcher sends along: general
tokens' are negated before and all made positive again after, which is exact, so that what the
experts compute is bitwise what it would be. No collective is added, except that experts split over
tensor-parallel ranks have to add up the differences of their parts.

Per layer: sum over general tokens t and experts e of g_te |f_e(x_t) - f0_e(x_t)|^2 / |f0_e(x_t)|^2,
divided by the number of general tokens in the whole step; then the mean over layers. Tokens are
those that the data's loss mask counts.

Shapes: n micro-batches, b samples, l this rank's part of the sequence, h hidden, E experts, E_l
local experts, m rows of this rank's experts, r those of general tokens and experts that train.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

from megatron_moe_inject.host.agreement import agree, union
from megatron_moe_inject.host.attached_loss import (
    add_reports,
    attach_loss,
    step_scale,
    sum_and_count,
)
from megatron_moe_inject.host.clock import ChunkClock, Passages
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.labels import (
    GENERAL,
)
from megatron_moe_inject.host.megatron_types import Chunk, Groups, MegatronModule
from megatron_moe_inject.host.model_parts import (
    EXPERTS,
    decoder_layers,
    grouped_linears,
    mlp_of,
    places,
)
from megatron_moe_inject.host.own_tokens import OwnTokens
from megatron_moe_inject.host.to_device import to_device
from megatron_moe_inject.host.wrap import Call, wrap_method
from megatron_moe_inject.retention.originals import OriginalParameters
from megatron_moe_inject.retention.uses import DISPATCH, HELD_EXPERTS, HELD_GROUPED_EXPERTS

REPORTED = "expert retention"
_LATER = "overlap_dispatch_backward_with_experts_wgrad"
_TINY = 1e-12


class _HeldLayer(Passages):
    """One MoE layer with local experts that train.

    Args:
        clock: that of its chunk.
        layer: Megatron's ``MoELayer``.
        trains: parameters that train, by index of the local expert.
    """

    def __init__(
        self,
        clock: ChunkClock,
        layer: MegatronModule,
        trains: Mapping[int, Sequence[torch.nn.Parameter]],
    ) -> None:
        super().__init__(clock)
        self.experts = layer.experts
        self.parameters = [p for parameters in trains.values() for p in parameters]
        self.first = False
        trained = torch.tensor([i in trains for i in range(layer.num_local_experts)])
        self._trained = to_device(trained, next(layer.parameters()).device)

    def wanted(
        self, general: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the experts' m rows are of general tokens and of experts that train, bool
        ``[m]``, and how many of each expert, ``[E_l]``.

        Args:
            general: bool ``[m]``.
            counts: rows by expert, on the same device.
        """
        expert = torch.repeat_interleave(counts, output_size=len(general))
        wanted = general & self._trained[expert]
        return wanted, torch.zeros_like(counts).index_add_(0, expert, wanted.to(counts.dtype))


class ExpertRetention:
    """Computes and attaches the losses of one rank.

    Args:
        chunks: this rank's bare model chunks.
        groups: the student's ``ProcessGroupCollection``.
        originals: those of the experts that train, at least.
        weight_at: the weight after that many optimizer steps.
        packed: whether a micro-batch is one row of its samples; see ``host.own_tokens``.

    Collectives: one all-gather of errors and one of layer numbers over the whole world.

    Raises:
        RecipeError: on every rank, where no expert of any rank trains, a layer keeps its experts in
            one parameter, or weight gradients of experts are delayed.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        groups: Groups,
        originals: OriginalParameters,
        weight_at: Callable[[int], float],
        *,
        packed: bool = False,
    ) -> None:
        self._config = chunks[0].config
        if getattr(self._config, _LATER, False):
            raise RecipeError(
                f"--{_LATER.replace('_', '-')}: forms weight gradients of experts that run once in "
                "a forward pass; remove it, or set retention.experts to 0"
            )
        self._device = next(chunks[0].parameters()).device
        self._groups = groups
        self._tokens = OwnTokens(
            groups, sequence_parallel=self._config.sequence_parallel, packed=packed
        )
        self._originals = originals
        self._weight_at = weight_at
        self._active = False
        self._clocks: list[ChunkClock] = []
        self._layers: list[_HeldLayer] = []
        trained = agree(lambda: [_trained_experts(chunk) for chunk in chunks])
        layers = {layer for by_layer in trained for layer in by_layer}
        self._num_layers = _count_layers(layers, self._config.num_layers)
        for chunk, by_layer in zip(chunks, trained, strict=True):
            clock = ChunkClock(chunk)
            self._clocks.append(clock)
            for layer in decoder_layers(chunk):
                self._watch(clock, layer, by_layer.get(layer.layer_number - 1, {}))

    def _watch(
        self,
        clock: ChunkClock,
        layer: MegatronModule,
        trains: Mapping[int, Sequence[torch.nn.Parameter]],
    ) -> None:
        """Every rank marks the tokens of every MoE layer: others' experts may train there."""
        moe = mlp_of(layer)
        if getattr(moe, "token_dispatcher", None) is None:
            return
        first = moe.local_expert_indices[0]
        held = _HeldLayer(clock, moe, {i - first: parameters for i, parameters in trains.items()})
        self._layers.append(held)
        grouped = bool(grouped_linears(moe.experts))
        forward = HELD_GROUPED_EXPERTS if grouped else HELD_EXPERTS
        wrap_method(moe.token_dispatcher, DISPATCH, functools.partial(self._dispatch, held))
        wrap_method(moe.experts, forward, functools.partial(self._forward, held))

    def _dispatch(self, held: _HeldLayer, call: Call) -> Any:
        """``MoETokenDispatcher.dispatch_preprocess``."""
        if not self._active:
            return call()
        # The states come first, by a name that dispatchers do not share.
        states = call.args[0] if call.args else call.kwargs["hidden_states"]
        return call(probs=self._mark(held, states.shape[:2], call["probs"]))

    def _forward(self, held: _HeldLayer, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The forward pass of a layer's experts, which gives their rows and a bias."""
        if not self._active:
            return call()
        probs = call["permuted_probs"]
        general = probs.signbit()
        probs = torch.where(general, -probs, probs)
        output, bias = call(permuted_probs=probs)
        return self._hold(held, output, call, probs, general), bias

    def begin(
        self,
        labels: torch.Tensor,
        iteration: int,
        sequence_length: int,
        loss_mask: torch.Tensor | None = None,
    ) -> None:
        """Start a step.

        Args:
            labels: ``[n, b]`` domain indices, on the host.
            iteration: optimizer steps taken so far.
            sequence_length: of whole sequences.
            loss_mask: see ``Step.loss_mask``.

        Collectives: one all-reduce of two numbers over the data- and context-parallel ranks.
        """
        length = sequence_length // self._groups.cp.size()
        general = labels == GENERAL
        own = self._tokens.of_samples(general, length)
        counts = [general.sum() * length, general.numel() * length]
        if loss_mask is not None:
            counted = self._tokens.of_rank(loss_mask)
            mask = counted & general.unsqueeze(-1)
            own, counts = self._tokens.of(mask), [mask.sum(), counted.sum()]
        self._general = to_device(own, self._device)
        totals = to_device(torch.tensor([float(count) for count in counts]), self._device)
        if self._groups.dp_cp.size() > 1:
            dist.all_reduce(totals, group=self._groups.dp_cp)
        self._count, tokens = totals
        weight = self._weight_at(iteration)
        scale = step_scale(self._config, self._groups, tokens, self._device)
        self._factor = weight * scale / (self._count.clamp(min=1) * self._num_layers)
        self._sum = torch.zeros((), dtype=torch.float32, device=self._device)
        self._attaches = weight > 0
        for clock in self._clocks:
            clock.reset()
        for layer in self._layers:
            layer.reset()
        self._active = True

    def end(self, reports: Any) -> None:
        """Finish the step and add what was measured to what the schedule returned.

        Args:
            reports: on the last stage, one dictionary per micro-batch of this step.

        Collectives: one all-reduce of one number over the whole world.
        """
        self._active = False
        if self._groups.expt_tp.rank() > 0:  # it has the same rows as the first
            self._sum.zero_()
        dist.all_reduce(self._sum)
        add_reports(reports, {REPORTED: sum_and_count(self._sum / self._num_layers, self._count)})

    def _mark(self, held: _HeldLayer, shape: Sequence[int], probs: torch.Tensor) -> torch.Tensor:
        """Gates ``[l b, E]`` of a micro-batch's states ``shape``, ``[l, b]``, those of general
        tokens negated."""
        micro_batch, held.first = held.passing()
        rows = self._tokens.seen(self._general[micro_batch], shape).reshape(-1, 1)
        return torch.where(rows, -probs, probs)

    def _hold(
        self,
        held: _HeldLayer,
        output: torch.Tensor,
        call: Call,
        probs: torch.Tensor,
        general: torch.Tensor,
    ) -> torch.Tensor:
        """The experts' ``output`` ``[m, h]`` with the loss of their general rows attached.

        Args:
            call: of their forward pass, with states ``[m, h]`` in the order of local experts, and
                tokens by expert, ``[E_l]``.
            probs: gates, ``[m]``.
            general: bool ``[m]``.
        """
        trains = torch.is_grad_enabled() and output.requires_grad and self._attaches
        if not held.parameters or not (trains or held.first):
            return output
        counts = torch.as_tensor(call["tokens_per_expert"])
        wanted, per_expert = held.wanted(general, to_device(counts, general.device))
        wanted_counts = per_expert.to(counts)  # for which the host waits, as to dispatch the rows
        chosen = int(wanted_counts.sum())
        if not chosen:
            return output
        rows = torch.nonzero_static(wanted, size=chosen).flatten()
        gates = probs.detach()[rows]
        again = functools.partial(
            call.stock,
            permuted_local_hidden_states=call["permuted_local_hidden_states"].detach()[rows],
            tokens_per_expert=wanted_counts,
            permuted_probs=gates,
        )
        with torch.no_grad(), self._originals.running(held.parameters):
            before = again()[0]
        with torch.set_grad_enabled(trains):
            now = again()[0]
            before = before.float()
            change = now.float() - before
            if self._groups.expt_tp.size() > 1:
                change = reduce_from_tensor_model_parallel_region(change, self._groups.expt_tp)
                before = reduce_from_tensor_model_parallel_region(before, self._groups.expt_tp)
            errors = change.square().sum(-1) / before.square().sum(-1).clamp(min=_TINY)
            loss = (errors * gates.float()).sum()
        if held.first:
            self._sum += loss.detach()
        return attach_loss(output, loss, self._factor) if trains else output


def _trained_experts(
    chunk: Chunk,
) -> dict[int, dict[int, list[torch.nn.Parameter]]]:
    """Parameters that train, by 0-based layer and global id of the expert.

    Raises:
        RecipeError: one is of several experts.
    """
    by_layer: dict[int, dict[int, list[torch.nn.Parameter]]] = {}
    for place, parameter in places(chunk):
        if place.component == EXPERTS and parameter.requires_grad:
            assert place.layer is not None, place.name
            if place.expert is None:
                raise RecipeError(
                    f"retention.experts: holds each expert to its own outputs, but layer "
                    f"{place.layer} keeps its experts in one parameter ({place.name}); build it "
                    "with a parameter for each, or set retention.experts to 0",
                    "retention.experts",
                )
            by_layer.setdefault(place.layer, {}).setdefault(place.expert, []).append(parameter)
    return by_layer


def _count_layers(own: set[int], num_layers: int) -> int:
    layers = union(own, num_layers)
    if not layers:
        raise RecipeError(
            "retention.experts: holds experts, but none train; set train.experts to "
            "selected or all, or remove it",
            "retention.experts",
        )
    return len(layers)
