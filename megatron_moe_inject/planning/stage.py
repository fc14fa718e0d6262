"""One pipeline stage as Megatron builds it: what each of its ranks holds between steps, in bytes.

Megatron's own ``setup_model_and_optimizer`` builds the stage of one rank on meta tensors, with the
parts of the run that change a student before DDP (freezing, router rows, projections), so counts
are those of the run by construction. Ranks of other experts have the same modules: their ids are
put in place, the parts' policy is applied again, and Megatron's own functions lay out the buffers.

Shapes: none; everything is a number of elements or bytes.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_moe_inject.experts.train.freeze import FreezePolicy, first_trainable_layer
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.megatron_types import Chunk, MegatronModule
from megatron_moe_inject.host.model_parts import (
    EXPERTS,
    decoder_layers,
    mlp_of,
    places,
)
from megatron_moe_inject.planning.layout import Layout
from megatron_moe_inject.recipe.features import FEATURES
from megatron_moe_inject.recipe.run_part import RunContext, RunPart
from megatron_moe_inject.teachers.part import TeacherInfos

_PARTS = ("train", "adapters", "imitation", "router_rows")
"""Features whose parts change a student before DDP and the optimizer."""


@dataclass(frozen=True)
class Census:
    """Parameters of one rank.

    Attributes:
        held: elements by component.
        trained: elements by component that train.
        trained_bytes: of their values, by component.
        bytes: of all values, registered buffers included.
        dense, experts: elements by component of the whole model that this rank stands for: of
            dense parameters those of all tensor-parallel ranks, of expert-parallel ones those of
            the ranks that hold the same experts.
        dense_trained, experts_trained: of these, what trains.
        trained_experts: how many experts train, by 0-based global layer.
        frozen_expert_elements: elements of experts that do not train.
        multiplied_elements: elements of matrices that decoder layers multiply by, of which frozen
            experts' are apart.
    """

    held: Counter[str]
    trained: Counter[str]
    trained_bytes: Counter[str]
    bytes: int
    dense: Counter[str]
    dense_trained: Counter[str]
    experts: Counter[str]
    experts_trained: Counter[str]
    trained_experts: Mapping[int, int]
    frozen_expert_elements: int
    multiplied_elements: int


@dataclass(frozen=True)
class Shards:
    """Buffers and optimizer state of the ranks of one stage that hold the same experts.

    Attributes:
        gradient_bytes: of the gradient buffers.
        padding_bytes: of parameter buffers, beyond the parameters in them.
        dense_state: bytes of optimizer state by position among the ranks with the same dense
            parameters; one entry where each holds it whole.
        expert_state: the same of experts.
    """

    gradient_bytes: int
    padding_bytes: int
    dense_state: Sequence[int]
    expert_state: Sequence[int]

    def state(self, dense: int, expert: int) -> int:
        """Bytes of optimizer state of a rank at these positions."""
        return (
            self.dense_state[dense % len(self.dense_state)]
            + self.expert_state[expert % len(self.expert_state)]
        )


@dataclass(frozen=True)
class StateBytes:
    """Bytes that the optimizer keeps for an element that trains, beside its value and gradient."""

    of_half: float
    of_float: float

    @classmethod
    def of_args(cls, given: Namespace) -> StateBytes:
        """Of Megatron's arguments as the user gave them.

        Raises:
            RecipeError: an optimizer whose state is not known here.
        """
        if given.optimizer not in ("adam", "sgd"):
            raise RecipeError(
                f"--optimizer: the state of {given.optimizer} is not planned; plan with adam, "
                "whose two moments are the most that Megatron's optimizers keep"
            )
        moments = {"adam": 2, "sgd": int(bool(getattr(given, "sgd_momentum", 0)))}
        sizes = [4.0] * moments[given.optimizer]
        main = 4.0
        if getattr(given, "use_precision_aware_optimizer", False):
            names = ("exp_avg_dtype", "exp_avg_sq_dtype")
            sizes = [_itemsize(getattr(given, name)) for name in names][: len(sizes)]
            main = _itemsize(given.main_params_dtype)
        return cls(main + sum(sizes), sum(sizes))


def _itemsize(dtype: Any) -> float:
    words = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "fp8": 1.0}
    return words[dtype] if isinstance(dtype, str) else float(dtype.itemsize)


@dataclass
class Stage:
    """The stage that was built, on the rank that it was built for.

    Attributes:
        chunks: bare model chunks.
        policy: what trains.
    """

    context: RunContext
    parts: Sequence[RunPart]
    model: Sequence[MegatronModule]
    chunks: Sequence[Chunk]
    optimizer: Any

    @property
    def policy(self) -> FreezePolicy:
        """The run's."""
        return self.context.need(FreezePolicy)

    @property
    def layers(self) -> list[list[int]]:
        """0-based global decoder layers of each chunk."""
        return [[la.layer_number - 1 for la in decoder_layers(chunk)] for chunk in self.chunks]

    @property
    def first_trainable(self) -> int:
        """Lowest position that needs gradients on this rank; see ``first_trainable_layer``."""
        return first_trainable_layer(self.chunks, self.context.facts.num_layers)

    def no_communication(self) -> None:
        """Let micro-batches run as those before a step's last do, with parameters gathered."""
        for ddp in self.model:
            if ddp.ddp_config.overlap_param_gather:
                ddp.disable_forward_pre_hook(param_sync=False)
            for group in (*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups):
                group.is_last_microbatch = False

    def give_experts(self, ep_rank: int) -> tuple[bool, ...]:
        """Take the experts of another expert-parallel rank, and freeze them as the run does.

        Returns:
            For each parameter of an expert, in order, whether it trains.
        """
        for chunk in self.chunks:
            for layer in decoder_layers(chunk):
                mlp = mlp_of(layer)
                if (ids := getattr(mlp, "local_expert_indices", None)) is None:
                    continue
                first = ep_rank * len(ids)
                mlp.local_expert_indices = list(range(first, first + len(ids)))
        train = []
        for chunk in self.chunks:
            for place, parameter in places(chunk):
                if place.component == EXPERTS:
                    train.append(self.policy.trains(place))
                    parameter.requires_grad_(train[-1])
        return tuple(train)

    def census(self, layout: Layout) -> Census:
        """Count the parameters as they are."""
        held, trained, trained_bytes = (Counter[str]() for _ in range(3))
        whole = {(e, t): Counter[str]() for e in (False, True) for t in (False, True)}
        experts: dict[int, set[int]] = {}
        total = frozen_experts = multiplied = 0
        for chunk in self.chunks:
            total += sum(buffer.nbytes for buffer in chunk.buffers())
            for place, parameter in places(chunk):
                size, trains = parameter.numel(), parameter.requires_grad
                total += parameter.nbytes
                held[place.component] += size
                if trains:
                    trained[place.component] += size
                    trained_bytes[place.component] += parameter.nbytes
                    if place.expert is not None and place.layer is not None:
                        experts.setdefault(place.layer, set()).add(place.expert)
                elif place.component == EXPERTS:
                    frozen_experts += size
                in_layer = place.layer is not None or place.component == "mtp"
                matrix = parameter.dim() == 2 and place.component != "router"
                if in_layer and matrix and (trains or place.component != EXPERTS):
                    multiplied += size
                if getattr(parameter, "shared", False):
                    continue  # the embedding's copy on another stage
                of_expert = not getattr(parameter, "allreduce", True)
                sharded = getattr(parameter, "tensor_model_parallel", False)
                size *= (layout.etp if of_expert else layout.tp) if sharded else 1
                whole[of_expert, False][place.component] += size
                if trains:
                    whole[of_expert, True][place.component] += size
        return Census(
            held,
            trained,
            trained_bytes,
            total,
            whole[False, False],
            whole[False, True],
            whole[True, False],
            whole[True, True],
            {layer: len(ids) for layer, ids in experts.items()},
            frozen_experts,
            multiplied,
        )

    def shards(self, layout: Layout, state: StateBytes) -> Shards:
        """Buffers and optimizer state with the parameters that train now.

        By Megatron's layout functions, as its DDP and optimizer call them.
        """
        from megatron.core.distributed.param_and_grad_buffer import group_params_for_buffers
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

        gradients = padding = 0
        dense: Any = np.zeros(1, dtype=np.float64)
        expert: Any = np.zeros(1, dtype=np.float64)
        for ddp, chunk in zip(self.model, self.chunks, strict=True):
            config = ddp.ddp_config
            trained = [p for p in chunk.parameters() if p.requires_grad]
            if not config.use_distributed_optimizer:
                for key, (members, _) in group_params_for_buffers(
                    trained, config.grad_reduce_in_fp32
                ).items():
                    size = sum(p.numel() for p in members)
                    gradients += size * key.grad_dtype.itemsize
                    dense = dense + size * _per_element(state, key.param_dtype)
                continue
            sizes = (ddp.intra_dp_cp_group.size(), ddp.intra_expt_dp_group.size())
            full = DistributedOptimizer.compute_full_param_layout(
                trained, ddp.bucket_size, sizes[0], config, expert_data_parallel_world_size=sizes[1]
            )
            for key, buffer in full.layouts.items():
                end = buffer.bucket_indices[-1][1] if buffer.bucket_indices else 0
                used = sum(p.numel() for p in buffer.param_index_map)
                gradients += end * key.grad_dtype.itemsize
                padding += (end - used) * key.param_dtype.itemsize
                size = sizes[key.is_expert_parallel]
                held = _shard_elements(buffer, size) * _per_element(state, key.param_dtype)
                if key.is_expert_parallel:
                    expert = expert + held
                else:
                    dense = dense + held
        return Shards(gradients, padding, [int(n) for n in dense], [int(n) for n in expert])

    def built_bytes(self) -> tuple[int, int]:
        """Bytes of the gradient buffers and optimizer elements that Megatron has really made.

        Returns:
            Bytes of gradient buffers; elements that the optimizer updates on this rank.
        """
        gradients = sum(
            buffer.grad_data.nbytes
            for ddp in self.model
            for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)
        )
        elements = sum(
            parameter.numel()
            for inner in getattr(self.optimizer, "chained_optimizers", [self.optimizer])
            if getattr(inner, "optimizer", None) is not None
            for group in inner.optimizer.param_groups
            for parameter in group["params"]
        )
        return gradients, elements


def _per_element(state: StateBytes, dtype: torch.dtype) -> float:
    return state.of_float if dtype == torch.float32 else state.of_half


def _shard_elements(buffer: Any, size: int) -> np.ndarray:
    """Elements of parameters in each of ``size`` even shards of a buffer's buckets."""
    spans = sorted((start, end) for start, end, _ in buffer.param_index_map.values())
    starts = np.array([start for start, _ in spans], dtype=np.int64)
    ends = np.array([end for _, end in spans], dtype=np.int64)
    before = np.concatenate([[0], np.cumsum(ends - starts)])

    def covered(at: np.ndarray) -> np.ndarray:
        """Elements of parameters below these positions."""
        index = np.searchsorted(starts, at, side="right")
        inside = np.clip(at - starts[index - 1], 0, (ends - starts)[index - 1])
        return np.where(index > 0, before[index - 1] + inside, 0)

    elements = np.zeros(size, dtype=np.int64)
    for first, last in buffer.bucket_indices:
        edges = first + (last - first) // size * np.arange(size + 1)
        elements += np.diff(covered(edges))
    return elements


class StageBuilder:
    """Builds stages of a job.

    Args:
        args: of ``job.prepare``.
        context: makes what the parts of a run share; new for each stage.
        teachers: what the teachers' files say.
    """

    def __init__(self, args: Namespace, context: Any, teachers: TeacherInfos) -> None:
        self._args = args
        self._context = context
        self._teachers = teachers

    def build(self) -> Stage:
        """The stage of the rank that is simulated now."""
        from megatron.core.enums import ModelType
        from megatron.training import training

        from megatron_moe_inject.host import gpt_entry

        context: RunContext = self._context()
        context.provide(TeacherInfos, self._teachers)
        _check_adapters(context)
        parts = [part for name in _PARTS if (part := FEATURES[name].start(context)) is not None]
        args, provider = self._args, gpt_entry.model_provider
        config = compat.model_config(args)
        if getattr(args, "hybrid_layer_pattern", None) is not None:
            provider = functools.partial(gpt_entry.hybrid_model_provider, config)
        elif args.spec is not None:
            provider = functools.partial(_of_spec, config)

        def before_ddp(chunks: list[Chunk]) -> list[Chunk]:
            for part in parts:
                part.before_ddp(chunks)
            return chunks

        stock = training.setup_model_and_optimizer
        training.to_empty_if_meta_device = _as_it_is
        arguments = {"model_provider_func": provider, "model_type": ModelType.encoder_or_decoder}
        with torch.device("meta"):
            model, optimizer, _ = compat.call_with_pre_wrap_hook(stock, (), arguments, before_ddp)
        return Stage(context, parts, model, compat.bare_chunks(model), optimizer)


def _check_adapters(context: RunContext) -> None:
    """Ranks with other experts are planned from those of one, which must have as many adapters."""
    if context.facts.parallel.ep == 1:
        return
    for i, entry in enumerate(context.recipe.train.adapters):
        if entry.patterns or ("experts" in entry.components and entry.experts == "selected"):
            raise RecipeError(
                f"train.adapters[{i}]: adapters on some of the experts are not planned with "
                "--expert-model-parallel-size above 1; plan with experts: all, which is the most, "
                "or with one expert-parallel rank"
            )


def _of_spec(
    model: Any,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    """A chunk of the GPT model whose layers ``--spec`` makes of Megatron's ``GPTModelConfig``."""
    from megatron_moe_inject.host import gpt_entry

    layers = model.transformer_layer_spec(model, vp_stage=vp_stage)
    return gpt_entry.model_provider(
        pre_process, post_process, vp_stage, model.transformer, pg_collection, layers
    )


def _as_it_is(module: torch.nn.Module, **_: Any) -> torch.nn.Module:
    """In the place of Megatron's allocation of what was built on meta."""
    return module
