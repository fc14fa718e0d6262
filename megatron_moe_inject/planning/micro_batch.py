"""What one micro-batch costs a rank: bytes kept until its backward pass, the peaks of both passes,
and floating-point operations.

The forward and backward pass of each model chunk really run, on meta tensors, with the run's own
freezing and gradient boundary, Megatron's recompute as configured, and the run's own fused loss.
Every expert gets the same number of tokens.

Layers that follow each other and are alike run as two: what they keep and compute is that of the
second. So 48 layers cost the planner's time of a few.

Shapes: s sequence, b micro-batch, h hidden, h_t a teacher's, v vocabulary, p tensor-parallel size.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_moe_inject import losses
from megatron_moe_inject.adapters.vocabulary import change_head
from megatron_moe_inject.experts.train.boundary import GradientBoundary
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.loss_seam import LossSeam
from megatron_moe_inject.host.megatron_types import Chunk
from megatron_moe_inject.host.model_parts import decoder_layers, places
from megatron_moe_inject.losses.objective import SampleGroup, injection_loss
from megatron_moe_inject.losses.spec import Divergence, LogitTransform, TermWeights
from megatron_moe_inject.losses.target import Dense
from megatron_moe_inject.planning.allocations import Allocations, Saved
from megatron_moe_inject.planning.costs import ChunkCost
from megatron_moe_inject.planning.stand_ins import Products, as_on_gpus
from megatron_moe_inject.recipe.schema import Recipe

_LAYERS_ALIKE = 2
"""How many of a run of equal layers are measured: a first, and one that stands for the others."""


@dataclass(frozen=True)
class Job:
    """What a chunk's cost depends on beside Megatron's arguments.

    Attributes:
        recipe: the divergence and the weights; None for stock's cross-entropy.
        valid_vocab_size: ids that are not padding.
        teacher_hidden: h_t of the widest teacher; None without one.
        grouped: see ``stand_ins.as_on_gpus``.
    """

    recipe: Recipe | None
    valid_vocab_size: int
    teacher_hidden: int | None = None
    grouped: bool = False


@dataclass
class _LayerMeter:
    """What each decoder layer added in the forward pass, and its part of the backward pass.

    The backward pass belongs to the layer that last began: that runs again, or whose output has
    got its gradient.
    """

    allocations: Allocations
    saved: Saved
    flops: Callable[[], float]
    kept: list[int] = field(default_factory=list)
    packed: list[int] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)
    marks: list[tuple[int, float]] = field(default_factory=list)
    backward: bool = False

    def watch(self, at: int, layer: Any) -> Iterator[Any]:
        """Hook the layer in that place; yields what takes the hooks off."""
        yield layer.register_forward_pre_hook(lambda *_: self._begin(at)).remove
        yield layer.register_forward_hook(lambda *call: self._end(at, call[2])).remove

    def _begin(self, at: int) -> None:
        if self.backward:
            self.marks.append((at, self.flops()))
        self._start = (self.saved.bytes, self.flops())
        if not self.kept:
            self._before = self.allocations.now

    def _end(self, at: int, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if states.requires_grad:
            states.register_hook(lambda _: self.marks.append((at, self.flops())))
        if self.backward:
            return
        packed, forward = self._start
        self.kept.append(self.allocations.now - self._before)
        self._before = self.allocations.now
        self.packed.append(self.saved.bytes - packed)
        self.forward.append(self.flops() - forward)

    def backward_by_layer(self, layers: int, end: float) -> list[float]:
        """Operations of each layer in the backward pass, given their count at its end."""
        by_layer = [0.0] * layers
        for (at, begin), (_, stop) in pairwise([*self.marks, (0, end)]):
            by_layer[at] += stop - begin
        return by_layer


def layer_signature(layer: Any) -> tuple:
    """Equal for layers that cost the same: kinds, shapes and what of them trains, whichever expert.

    Experts that do not stand in a tensor of their own count by number.
    """
    counts: dict[tuple, int] = {}
    for name, parameter in layer.named_parameters():
        head, is_expert, rest = name.partition("local_experts.")
        key = (head, rest.partition(".")[2] if is_expert else "", tuple(parameter.shape))
        counts[(*key, parameter.requires_grad)] = counts.get((*key, parameter.requires_grad), 0) + 1
    return type(layer).__name__, tuple(sorted(counts.items()))


@dataclass(frozen=True)
class ChunkShape:
    """What the cost of a chunk follows from, without the chunk.

    Attributes:
        ends: whether it has the embedding and the output layer.
        layers: 0-based global decoder layers and their signatures.
        rest: parameters outside the decoder's layers.
    """

    ends: tuple[bool, bool]
    layers: tuple[tuple[int, tuple], ...]
    rest: tuple

    @classmethod
    def of(cls, chunk: Chunk) -> ChunkShape:
        """Of a chunk as it trains now."""
        rest = sorted(
            (at.component, tuple(p.shape), p.requires_grad)
            for at, p in places(chunk)
            if at.layer is None
        )
        layers = tuple((la.layer_number - 1, layer_signature(la)) for la in decoder_layers(chunk))
        return cls((chunk.pre_process, chunk.post_process), layers, tuple(rest))

    def key(self, boundary: int, cut: bool) -> tuple:
        """Equal for chunks that cost the same, given where backward stops."""
        numbers = [number for number, _ in self.layers]
        below = sum(number < boundary for number in numbers)
        at_boundary = boundary in numbers
        signatures = tuple(signature for _, signature in self.layers)
        return self.ends, below, at_boundary, boundary < 0, cut, signatures, self.rest


def _first(layers: Sequence[Any]) -> int:
    return layers[0].layer_number - 1


def chunk_cost(
    chunk: Chunk,
    args: Namespace,
    boundary: int,
    job: Job,
    *,
    cut: bool,
    on_gpus: bool = True,
) -> ChunkCost:
    """Run one micro-batch through a bare chunk that no boundary has been attached to.

    Args:
        args: Megatron's, validated.
        boundary: where backward stops; see ``experts.train.boundary``.
        cut: the stage before runs forward only.
        on_gpus: kernels keep what those of GPUs keep; else what this machine's operations keep.
    """
    products = Products(args.context_parallel_size)
    if on_gpus:
        as_on_gpus([chunk], products, grouped=job.grouped)
    layers = decoder_layers(chunk)
    kept_layers, repeats = _representatives(layers, boundary, args)
    position = boundary
    if layers:
        first = _first(layers)
        position = first + sum(layer.layer_number - 1 < boundary for layer in kept_layers)
        position = boundary if boundary < first else position
        if boundary >= first + len(layers):
            position = boundary
        chunk.decoder.layers = torch.nn.ModuleList(kept_layers)
        chunk.decoder.num_layers_per_pipeline_rank = len(kept_layers)
    GradientBoundary(chunk, position, cut=cut)
    return _run(chunk, args, job, products, kept_layers, repeats, on_gpus)


def _representatives(
    layers: Sequence[Any], boundary: int, args: Namespace
) -> tuple[list[Any], list[int]]:
    """The layers that run, and how many more each stands for."""
    grouped = (getattr(args, "recompute_num_layers", None) or 1) > 1
    whole = args.recompute_granularity == "full" and (grouped or args.recompute_method == "block")
    kept: list[Any] = []
    repeats: list[int] = []
    run: list[tuple] = []
    for layer in layers:
        number = layer.layer_number - 1
        side = (number > boundary) - (number < boundary)
        signature = (side, *layer_signature(layer))
        if not whole and run[-_LAYERS_ALIKE:] == [signature] * _LAYERS_ALIKE:
            repeats[-1] += 1
            continue
        run.append(signature)
        kept.append(layer)
        repeats.append(0)
    return kept, repeats


def _run(
    chunk: Chunk,
    args: Namespace,
    job: Job,
    products: Products,
    layers: Sequence[Any],
    repeats: Sequence[int],
    on_gpus: bool,
) -> ChunkCost:
    config, device = chunk.config, torch.device("meta")
    length = args.seq_length // args.context_parallel_size
    share = args.tensor_model_parallel_size if config.sequence_parallel else 1
    b = args.micro_batch_size
    dtype = config.pipeline_dtype or config.params_dtype
    known = [*chunk.parameters(), *chunk.buffers()]
    known += [p.main_grad for p in chunk.parameters() if hasattr(p, "main_grad")]
    allocations, saved = Allocations(known), Saved(known)
    counter = FlopCounterMode(display=False)

    def flops() -> float:
        return counter.get_total_flops() + products.flops

    def tokens(kind: torch.dtype = torch.long) -> torch.Tensor:
        return torch.empty(b, length, dtype=kind, device=device)

    inputs: dict[str, Any] = {
        "input_ids": tokens(),
        "position_ids": tokens(),
        "attention_mask": None,
    }
    reads_batch = chunk.pre_process or chunk.post_process
    if not on_gpus and reads_batch and args.create_attention_mask_in_dataloader:
        whole = torch.empty(b, 1, length, args.seq_length, dtype=torch.bool, device=device)
        inputs["attention_mask"] = whole
    states_bytes = length // share * b * args.hidden_size * dtype.itemsize
    meter = _LayerMeter(allocations, saved, flops)
    loss_bytes = [0]
    with contextlib.ExitStack() as stack:
        for at, layer in enumerate(layers):
            for remove in meter.watch(at, layer):
                stack.callback(remove)
        if chunk.post_process:
            if job.recipe is not None:
                seam = LossSeam(chunk)
                change_head(seam, chunk)
                process = _loss_process(job.recipe, job, allocations, loss_bytes, chunk, seam)
                stack.enter_context(seam.using(process))
            inputs |= {"labels": tokens(), "loss_mask": tokens(torch.float32)}
        received: torch.Tensor | None = None
        with allocations, counter:
            if not chunk.pre_process:
                # A stage behind that of multi-token prediction gets the states of each depth.
                depths = 1 + (config.mtp_num_layers or 0)
                rows = depths if chunk.post_process and not chunk.mtp_process else 1
                received = torch.empty(
                    rows * length // share, b, args.hidden_size, dtype=dtype, device=device
                ).requires_grad_(True)
                chunk.set_input_tensor(received)
            hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor)
            with hooks:
                output = chunk(**inputs)
            output = output[0] if isinstance(output, tuple) else output
            forward_flops, forward_peak = flops(), allocations.peak
            kept = allocations.now - (0 if chunk.post_process else _own_bytes(output, saved))
            packed = saved.bytes
            allocations.forget_peak()
            backward_flops = 0.0
            meter.backward = True
            if output.requires_grad:
                torch.autograd.backward(output, torch.empty_like(output))
                backward_flops = flops() - forward_flops
    by_layer = meter.backward_by_layer(len(layers), flops())
    more_kept, more_saved = (_times(repeats, sizes) for sizes in (meter.kept, meter.packed))
    more_forward, more_backward = (_times(repeats, n) for n in (meter.forward, by_layer))
    return ChunkCost(
        kept=int(kept + more_kept),
        saved=int(packed + more_saved),
        forward_peak=int(forward_peak + more_kept),
        backward_peak=int(allocations.peak + more_kept) if output.requires_grad else 0,
        loss=loss_bytes[0],
        forward_flops=forward_flops + more_forward,
        backward_flops=backward_flops + more_backward,
        received=states_bytes,
    )


def _times(repeats: Sequence[int], of_each: Sequence[float]) -> float:
    """What the layers that were left out add."""
    return sum(n * value for n, value in zip(repeats, of_each, strict=True))


def _own_bytes(output: torch.Tensor, saved: Saved) -> int:
    """Bytes of the output that the schedule frees once it is sent: all, unless they are saved."""
    return 0 if output in saved else output.untyped_storage().nbytes()


def _loss_process(
    recipe: Recipe,
    job: Job,
    allocations: Allocations,
    taken: list[int],
    chunk: Chunk,
    seam: LossSeam,
) -> Callable[..., torch.Tensor]:
    """``output_processor``: the fused loss, as ``LossHook`` calls it for one kind of sample."""
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    objective = recipe.objective
    groups = compat.process_groups(chunk)
    tp_group = groups.tp if groups.tp.size() > 1 else None
    alpha, beta = (1.0 if job.teacher_hidden else 0.0), 1.0

    def process(
        *,
        hidden_states: torch.Tensor,
        output_layer: Any,
        output_weight: torch.Tensor | None,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        config: Any,
        **_: Any,
    ) -> torch.Tensor:
        before = allocations.now
        head = output_layer.weight if output_weight is None else output_weight
        if config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=tp_group
            )
        target = None
        if job.teacher_hidden:
            shape = (*labels.shape, job.teacher_hidden)
            states = head.new_empty(shape)
            target = Dense(states, head.new_empty(head.shape[0], job.teacher_hidden))
        student = losses.Student(
            hidden_states,
            head,
            labels.t(),
            losses.Vocabulary(tp_group, job.valid_vocab_size),
            LogitTransform(scale=compat.logit_scale(config)),
            losses.HeadRows.given(seam.head_rows),
            losses.LowRankHead.given(seam.head_low_rank),
        )
        promise = objective.masked_sum and student.head_trains
        options = losses.FusedOptions(
            kernels=None,
            reduce_hidden_grad=not config.sequence_parallel,
            upstream_mask=loss_mask.t() if promise else None,
        )
        weights = TermWeights(alpha, beta, Divergence(objective.divergence))
        group = SampleGroup(range(labels.shape[0]), weights, target)
        allocations_before_peak = allocations.peak
        terms = injection_loss(student, [group], options)
        taken[0] = max(allocations.peak, allocations_before_peak) - before
        return terms.total

    return process
