"""The freezing policy: which parameters of the student train.

Applied to the bare model chunks before DDP and the optimizer exist, so that a frozen parameter
has no gradient buffer, no optimizer state and no weight decay. Expert ids are global; Megatron
places experts contiguously over expert-parallel ranks (``MoELayer.local_expert_indices``).
Routers that stay frozen also keep their ``expert_bias``, which Megatron otherwise updates
outside the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_moe_inject.experts.train.uses import FROZEN_BIAS
from megatron_moe_inject.host.layer_pattern import name_matches
from megatron_moe_inject.host.megatron_types import Chunk, MegatronModule
from megatron_moe_inject.host.model_parts import BESIDE, EXPERTS, ROWS, ParameterPlace, places
from megatron_moe_inject.host.wrap import Call, wrap_method


@dataclass(frozen=True)
class FreezePolicy:
    """What trains.

    Attributes:
        experts: global expert ids that train, by 0-based global layer; ``None`` trains all.
        components: other components that train whole, from ``COMPONENTS``.
        layers: 0-based global layers that train whole.
        patterns: shell patterns over ``ParameterPlace.global_name`` that train, behind
            ``GPT_NAMES`` over ``gpt_name``.
        rows: rows of routers that train, expert ids by 0-based global layer.
        everything: nothing is frozen, whatever the others say; see ``EVERYTHING``.
    """

    experts: Mapping[int, frozenset[int]] | None
    components: frozenset[str]
    layers: frozenset[int] = frozenset()
    patterns: tuple[str, ...] = ()
    rows: Mapping[int, frozenset[int]] = field(default_factory=dict)
    everything: bool = False

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
        more["everything"] = self.everything
        return described | {name: value for name, value in more.items() if value}

    def trains(self, place: ParameterPlace) -> bool:
        """Whether the parameter at ``place`` trains.

        Raises:
            NotImplementedError: some experts of a layer are chosen but the layer keeps its
                experts in one fused parameter.
        """
        if self.everything or place.component in ("projections", *BESIDE):
            return True
        if place.layer in self.layers or self.matches(place):
            return True
        if place.component == "router" and place.name.endswith(f".{ROWS}"):
            return True
        if place.component != EXPERTS:
            return place.component in self.components
        if self.experts is None:
            return True
        assert place.layer is not None, "experts are those of a decoder layer"
        chosen = self.experts.get(place.layer, frozenset())
        if chosen and place.expert is None:
            raise NotImplementedError(
                f"layer {place.layer} keeps all its experts in one parameter ({place.name}); "
                f"training experts {sorted(chosen)} alone needs a parameter for each"
            )
        return place.expert in chosen

    def matches(self, place: ParameterPlace) -> list[str]:
        """The patterns that name the parameter at ``place``."""
        names = place.global_name, place.gpt_name
        return [pattern for pattern in self.patterns if name_matches(pattern, *names)]

    def apply(self, chunks: Iterable[Chunk]) -> None:
        """Set ``requires_grad`` on every parameter, and freeze the bias of frozen routers.

        Must run before DDP and the optimizer are built. No collective. Where everything trains, all
        is left as Megatron built it.
        """
        if self.everything:
            return
        for chunk in chunks:
            for place, parameter in places(chunk):
                parameter.requires_grad_(self.trains(place))
            for module in chunk.modules():
                trains = any(p.requires_grad for p in module.parameters(recurse=False))
                freeze_expert_bias(module, not trains)


EVERYTHING = FreezePolicy(None, frozenset(), everything=True)
"""The student trains as in stock Megatron."""


def freeze_expert_bias(router: MegatronModule, frozen: bool) -> None:
    """Let Megatron update a router's ``expert_bias`` after each step, or leave it bitwise as it is.

    0.19 leaves it where ``frozen_expert_bias`` says so. 0.18 updates that of every router, by the
    sign of how far each expert's count of tokens is from the mean: there a frozen router counts
    nothing, so that its bias gets 0 added. Modules without an expert bias are left alone.
    """
    if hasattr(router, "frozen_expert_bias"):
        router.frozen_expert_bias = frozen
    elif frozen and getattr(router, "expert_bias", None) is not None:
        router.frozen_expert_bias = True
        wrap_method(router, FROZEN_BIAS, _count_nothing)


def _count_nothing(call: Call) -> None:
    """In the place of ``TopKRouter._apply_expert_bias``, which counts ``[t, E]`` choices."""


def _plain(by_layer: Mapping[int, Iterable[int]]) -> dict[str, list[int]]:
    return {str(layer): sorted(ids) for layer, ids in sorted(by_layer.items()) if ids}


def first_trainable_layer(chunks: Iterable[Chunk], num_layers: int) -> int:
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
            embedded = place.component == "embedding" or (
                place.component == "vocabulary_rows" and place.name.startswith("embedding.")
            )
            if embedded and not embedding_copy:
                return -1
            if place.layer is not None:
                lowest = min(lowest, place.layer)
    return lowest
