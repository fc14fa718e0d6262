"""A map of Megatron's model: which parameter belongs to which layer, component and expert.

Layers and experts have global numbers. Megatron places experts contiguously over expert-parallel
ranks (``MoELayer.local_expert_indices``). A bare chunk is one without DDP and Float16 wrappers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_moe_inject.host.layer_pattern import LayerPattern
from megatron_moe_inject.host.megatron_types import Chunk, Groups, MegatronModule

EXPERTS = "experts"


OWN_PREFIX = "inject_"
"""Names of what the plugin adds to checkpoints begin so."""


ROWS = "inject_rows"
"""Parameter of a router of which only some rows train."""


PROJECTIONS = f"{OWN_PREFIX}projections"
"""Name in a model chunk of the projections to teachers' widths, which always train."""


ADAPTER = f"{OWN_PREFIX}adapter"
"""Name in a linear layer of the low-rank change beside its weight, which always trains."""


VOCABULARY_ROWS = f"{OWN_PREFIX}vocabulary_rows"
"""Name in an embedding or output layer of the rows that train in the places of its own."""


BESIDE = ("adapters", "vocabulary_rows")
"""Components that stand beside a model that stays as it is: without them it is the original."""


def is_own(name: str) -> bool:
    """Whether a tensor of a checkpoint is one that the plugin added to the student."""
    return any(part.startswith(OWN_PREFIX) for part in name.split("."))


def is_adapter(name: str) -> bool:
    """Whether it is one that the model's values depend on: an adapter's, or vocabulary rows."""
    return any(part in (ADAPTER, VOCABULARY_ROWS) for part in name.split("."))


COMPONENTS = (
    EXPERTS,
    "router",
    "shared_experts",
    "attention",
    "norms",
    "mlp",
    "mamba",
    "embedding",
    "output_layer",
    "mtp",
    "projections",
    *BESIDE,
    "other",
)
"""Every parameter belongs to exactly one of these; names are those of ``recipe.schema.Train``."""


_LAYER = re.compile(r"(?:^|\.)decoder\.layers\.(\d+)\.(.*)")


_STORED_LAYER = re.compile(r"decoder\.layers\.(?:\d+\.)?(.*)")


_LOCAL_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(\d+)\.|linear_fc[12]\.(?:weight|bias)(\d+)$)"
)


_NORM = re.compile(r"(^|[._])(layer_?norm|input_layernorm|q_layernorm|k_layernorm|norm)(_|\.|$)")


@dataclass(frozen=True)
class ParameterPlace:
    """Where a parameter sits in the student.

    Attributes:
        name: its name in the model chunk.
        component: one of ``COMPONENTS``.
        layer: 0-based global decoder layer, ``None`` outside the decoder's layers.
        expert: global expert id for a parameter of one expert, ``None`` otherwise.
        global_name: its name with global layer and expert numbers, the same at every layout.
        gpt_name: the same in a GPT model of these weights; ``None`` where it has no such layer.
    """

    name: str
    component: str
    layer: int | None
    expert: int | None
    global_name: str
    gpt_name: str | None = None


def _component(name: str, in_layer: str | None) -> str:
    """Component of a parameter; ``in_layer`` is its name inside its decoder layer."""
    if name.startswith(f"{PROJECTIONS}."):
        return "projections"
    for part, component in ((ADAPTER, "adapters"), (VOCABULARY_ROWS, "vocabulary_rows")):
        if f".{part}." in name:
            return component
    if re.search(r"(^|\.)mtp\.", name):
        return "mtp"
    if in_layer is None:
        if "output_layer." in name:
            return "output_layer"
        if "embedding." in name:
            return "embedding"
        return "norms" if "norm" in name else "other"
    if in_layer.startswith("mlp.experts."):
        return EXPERTS
    if in_layer.startswith("mlp.shared_experts."):
        return "shared_experts"
    if in_layer.startswith("mlp.router."):
        return "router"
    if _NORM.search(in_layer):
        return "norms"
    if in_layer.startswith("mixer."):
        return "mamba"
    if in_layer.startswith(("self_attention.", "cross_attention.")):
        return "attention"
    return "mlp" if in_layer.startswith("mlp.") else "other"


def component_of_stored(name: str) -> str:
    """Component of a tensor of a checkpoint, whether its name is of one layer or of all."""
    match = _STORED_LAYER.match(name)
    return _component(name, None if match is None else match[1])


def decoder_layers(chunk: Chunk) -> list[MegatronModule]:
    """The chunk's decoder layers; each has a 1-based global ``layer_number``."""
    decoder = getattr(chunk, "decoder", None)
    return [] if decoder is None else list(decoder.layers)


def mlp_of(layer: MegatronModule) -> MegatronModule:
    """The MLP or the experts of a decoder layer, None for one that has none (Mamba)."""
    return getattr(layer, "mlp", None)


def grouped_linears(experts: MegatronModule) -> list[MegatronModule]:
    """The two grouped linear layers of Megatron's ``TEGroupedMLP``; none of other experts."""
    linears = [getattr(experts, name, None) for name in ("linear_fc1", "linear_fc2")]
    grouped = [linear for linear in linears if linear is not None and hasattr(linear, "weight0")]
    return grouped if len(grouped) == 2 else []


def local_weights(linear: MegatronModule) -> list[torch.nn.Parameter]:
    """Weights of a grouped linear layer in the order of local experts."""
    weights: list[torch.nn.Parameter] = []
    while (weight := linear._parameters.get(f"weight{len(weights)}")) is not None:
        weights.append(weight)
    return weights


def places(chunk: Chunk) -> Iterator[tuple[ParameterPlace, torch.nn.Parameter]]:
    """Place of every parameter of a bare model chunk (no DDP or Float16 wrapper)."""
    layers = decoder_layers(chunk)
    text = getattr(chunk, "hybrid_layer_pattern", None)
    pattern = None if text is None else LayerPattern(text)
    for name, parameter in chunk.named_parameters():
        match = _LAYER.search(name) if not re.search(r"(^|\.)mtp\.", name) else None
        if match is None:
            yield ParameterPlace(name, _component(name, None), None, None, name, name), parameter
            continue
        module, in_layer = layers[int(match[1])], match[2]
        expert = None
        if local := _LOCAL_EXPERT.match(in_layer):
            expert = module.mlp.local_expert_indices[int(local[1] or local[2])]
        number = module.layer_number - 1
        rest = in_layer if expert is None else _with_global_expert(in_layer, expert)
        whole = f"decoder.layers.{number}.{rest}"
        in_gpt = whole if pattern is None else pattern.gpt_name(whole)
        component = _component(name, in_layer)
        yield ParameterPlace(name, component, number, expert, whole, in_gpt), parameter


def _with_global_expert(in_layer: str, expert: int) -> str:
    """The same name for an expert of its own and for one of a grouped MLP."""
    one = re.sub(r"experts\.local_experts\.\d+\.", f"experts.{expert}.", in_layer)
    return re.sub(r"experts\.(linear_fc[12]\.(?:weight|bias))\d+$", rf"experts.{expert}.\1", one)


def routers(chunk: Chunk) -> Iterator[tuple[int, MegatronModule]]:
    """The routers of a bare chunk's decoder, each with its 0-based global layer."""
    for layer in decoder_layers(chunk):
        router = getattr(mlp_of(layer), "router", None)
        if router is not None:
            yield layer.layer_number - 1, router


def counts_here(parameter: torch.nn.Parameter, groups: Groups, *, replicated: bool = True) -> bool:
    """Whether this rank's copy is the one that counts.

    Data-parallel replicas and tensor-parallel duplicates count on the first rank of their group;
    the embedding's copy on the last pipeline stage (Megatron marks it ``shared``) does not.

    Args:
        parameter: of a model chunk.
        groups: the student's ``ProcessGroupCollection``.
        replicated: over data-parallel ranks; else each of them counts a part of its own.
    """
    expert = not getattr(parameter, "allreduce", True)
    replicas = groups.expt_dp if expert else groups.dp_cp
    sharding = groups.expt_tp if expert else groups.tp
    sharded = getattr(parameter, "tensor_model_parallel", False)
    first = not replicated or replicas.rank() == 0
    first = first and (sharded or sharding.rank() == 0)
    return first and not getattr(parameter, "shared", False)
