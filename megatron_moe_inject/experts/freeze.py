"""The freezing policy: which parameters of the student train.

Applied to the bare model chunks before DDP and the optimizer exist, so that a frozen parameter
has no gradient buffer, no optimizer state and no weight decay. Expert ids are global; Megatron
places experts contiguously over expert-parallel ranks (``MoELayer.local_expert_indices``).
Routers that stay frozen also keep their ``expert_bias``, which Megatron otherwise updates
outside the optimizer.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

EXPERTS = "experts"
OWN_PREFIX = "inject_"
"""Names of what the plugin adds to checkpoints begin so."""
ROWS = "inject_rows"
"""Parameter of a router of which only some rows train."""
PROJECTIONS = f"{OWN_PREFIX}projections"
"""Name in a model chunk of the projections to teachers' widths, which always train."""


def is_own(name: str) -> bool:
    """Whether a tensor of a checkpoint is one that the plugin added to the student."""
    return any(part.startswith(OWN_PREFIX) for part in name.split("."))


COMPONENTS = (
    EXPERTS,
    "router",
    "shared_experts",
    "attention",
    "norms",
    "mlp",
    "embedding",
    "output_layer",
    "mtp",
    "projections",
    "other",
)
"""Every parameter belongs to exactly one of these; the names are those of ``recipe.Train``."""

_LAYER = re.compile(r"(?:^|\.)decoder\.layers\.(\d+)\.(.*)")
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
    """

    name: str
    component: str
    layer: int | None
    expert: int | None
    global_name: str


def _component(name: str, in_layer: str | None) -> str:
    """Component of a parameter; ``in_layer`` is its name inside its decoder layer."""
    if name.startswith(f"{PROJECTIONS}."):
        return "projections"
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
    if in_layer.startswith(("self_attention.", "cross_attention.")):
        return "attention"
    return "mlp" if in_layer.startswith("mlp.") else "other"


def decoder_layers(chunk: torch.nn.Module) -> list[torch.nn.Module]:
    """The chunk's decoder layers; each has a 1-based global ``layer_number``."""
    decoder = getattr(chunk, "decoder", None)
    return [] if decoder is None else list(decoder.layers)


def grouped_linears(experts: torch.nn.Module) -> list[torch.nn.Module]:
    """The two grouped linear layers of Megatron's ``TEGroupedMLP``; none of other experts."""
    linears = [getattr(experts, name, None) for name in ("linear_fc1", "linear_fc2")]
    found = [linear for linear in linears if linear is not None and hasattr(linear, "weight0")]
    return found if len(found) == 2 else []


def local_weights(linear: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Weights of a grouped linear layer in the order of local experts."""
    weights = []
    while (weight := linear._parameters.get(f"weight{len(weights)}")) is not None:
        weights.append(weight)
    return weights


def places(chunk: torch.nn.Module) -> Iterator[tuple[ParameterPlace, torch.nn.Parameter]]:
    """Place of every parameter of a bare model chunk (no DDP or Float16 wrapper)."""
    layers = decoder_layers(chunk)
    for name, parameter in chunk.named_parameters():
        match = _LAYER.search(name) if not re.search(r"(^|\.)mtp\.", name) else None
        if match is None:
            yield ParameterPlace(name, _component(name, None), None, None, name), parameter
            continue
        module, in_layer = layers[int(match[1])], match[2]
        expert = None
        if local := _LOCAL_EXPERT.match(in_layer):
            expert = module.mlp.local_expert_indices[int(local[1] or local[2])]
        number = module.layer_number - 1
        rest = in_layer if expert is None else _with_global_expert(in_layer, expert)
        whole = f"decoder.layers.{number}.{rest}"
        yield ParameterPlace(name, _component(name, in_layer), number, expert, whole), parameter


def _with_global_expert(in_layer: str, expert: int) -> str:
    """The same name for an expert of its own and for one of a grouped MLP."""
    one = re.sub(r"experts\.local_experts\.\d+\.", f"experts.{expert}.", in_layer)
    return re.sub(r"experts\.(linear_fc[12]\.(?:weight|bias))\d+$", rf"experts.{expert}.\1", one)


@dataclass(frozen=True)
class FreezePolicy:
    """What trains.

    Attributes:
        experts: global expert ids that train, by 0-based global layer; ``None`` trains all.
        components: other components that train whole, from ``COMPONENTS``.
        layers: 0-based global layers that train whole.
        patterns: shell patterns over ``ParameterPlace.global_name`` that train.
        rows: rows of routers that train, expert ids by 0-based global layer.
    """

    experts: Mapping[int, frozenset[int]] | None
    components: frozenset[str]
    layers: frozenset[int] = frozenset()
    patterns: tuple[str, ...] = ()
    rows: Mapping[int, frozenset[int]] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """The policy in plain JSON values; equal for equal policies, and for no others, since the
        state of an optimizer is told apart by nothing else."""
        experts: Any = "all" if self.experts is None else _plain(self.experts)
        described = {"experts": experts, "components": sorted(self.components)}
        more: dict[str, Any] = {
            "layers": sorted(self.layers),
            "patterns": sorted(self.patterns),
            "router_rows": _plain(self.rows),
        }
        return described | {name: value for name, value in more.items() if value}

    def trains(self, place: ParameterPlace) -> bool:
        """Whether the parameter at ``place`` trains.

        Raises:
            NotImplementedError: some experts of a layer are chosen but the layer keeps its
                experts in one fused parameter.
        """
        if place.layer in self.layers or self.matches(place):
            return True
        if place.component == "projections":
            return True
        if place.component == "router" and place.name.endswith(f".{ROWS}"):
            return True
        if place.component != EXPERTS:
            return place.component in self.components
        if self.experts is None:
            return True
        chosen = self.experts.get(place.layer, frozenset())
        if chosen and place.expert is None:
            raise NotImplementedError(
                f"layer {place.layer} keeps all its experts in one parameter ({place.name}); "
                f"training experts {sorted(chosen)} alone needs a parameter for each"
            )
        return place.expert in chosen

    def matches(self, place: ParameterPlace) -> list[str]:
        """The patterns that name the parameter at ``place``."""
        return [p for p in self.patterns if fnmatch.fnmatchcase(place.global_name, p)]

    def apply(self, chunks: Iterable[torch.nn.Module]) -> None:
        """Set ``requires_grad`` on every parameter, and freeze the bias of frozen routers.

        Must run before DDP and the optimizer are built. No collective.
        """
        for chunk in chunks:
            for place, parameter in places(chunk):
                parameter.requires_grad_(self.trains(place))
            for module in chunk.modules():
                trains = any(p.requires_grad for p in module.parameters(recurse=False))
                freeze_expert_bias(module, not trains)


def freeze_expert_bias(router: torch.nn.Module, frozen: bool) -> None:
    """Let Megatron update a router's ``expert_bias`` after each step, or leave it bitwise as it is.

    0.19 leaves it where ``frozen_expert_bias`` says so. 0.18 updates that of every router, by the
    sign of how far each expert's count of tokens is from the mean: there a frozen router counts
    nothing, so that its bias gets 0 added. Modules without an expert bias are left alone.
    """
    if hasattr(router, "frozen_expert_bias"):
        router.frozen_expert_bias = frozen
    elif frozen and getattr(router, "expert_bias", None) is not None:
        router.frozen_expert_bias = True
        router._apply_expert_bias = _count_nothing


def _count_nothing(routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
    """In the place of ``TopKRouter._apply_expert_bias``, which counts ``[t, E]`` choices."""


def _plain(by_layer: Mapping[int, Iterable[int]]) -> dict[str, list[int]]:
    return {str(layer): sorted(ids) for layer, ids in sorted(by_layer.items()) if ids}


def first_trainable_layer(chunks: Iterable[torch.nn.Module], num_layers: int) -> int:
    """Lowest position on this rank that needs gradients.

    Returns:
        -1 for the embedding, a 0-based global layer, or ``num_layers`` when nothing below the
        final norm and the output layer trains (also when nothing trains on this rank).
    """
    lowest = num_layers
    for chunk in chunks:
        embedding_copy = not getattr(chunk, "pre_process", True)
        for place, parameter in places(chunk):
            if not parameter.requires_grad:
                continue
            if place.component == "embedding" and not embedding_copy:
                return -1
            if place.layer is not None:
                lowest = min(lowest, place.layer)
    return lowest
