"""The feed-forwards of a checkpoint with experts: routed, shared and dense ones, layer by layer."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection

import torch

from megatron_moe_inject.convert.naming import slot_of
from megatron_moe_inject.convert.neurons import Neurons
from megatron_moe_inject.experts.delta.weights import Weights
from megatron_moe_inject.experts.grow.stored_names import expert_name, unknown_names
from megatron_moe_inject.host.gpt_names import Place

_TENSOR = re.compile(r"(?:^|\.)linear_fc([12])\.(weight|bias)$")
_DENSE = re.compile(r"^mlp\.linear_fc[12]\.(weight|bias)$")
_SHARED = "mlp.shared_experts."
_GATE = f"{_SHARED}gate_weight"
_NORMS = ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")

Site = tuple[str, Place]
"""A stored tensor and indices on its leading axes, as ``Weights`` has them."""
Parts = dict[str, Site]
"""A feed-forward's tensors, by ``1.weight`` and so on."""


class StoredExperts:
    """What belongs to feed-forwards in a checkpoint, by layer.

    Args:
        weights: of the checkpoint.

    Attributes:
        layers: those with experts, rising.
        dense_layers: those with a dense feed-forward, rising.
        experts: of a layer.
        width: neurons of a routed expert.
        shared_width: of the shared one; 0 without.
        gated_shared: whether a sigmoid of the input scales the shared one's output.
        dense_width: neurons of the dense ones; 0 without.
        sites: all of these tensors, and the routers'.

    Raises:
        RecipeError: tensors of experts that are not known here, or that are not alike in all
            layers.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        unknown = unknown_names(weights.tensors)
        if unknown:
            raise weights.error(
                f"holds {unknown[0]}, which belongs to experts or routers and is not known here",
                "save the checkpoint with SequentialMLP or TEGroupedMLP experts, without FSDP",
            )
        self._routed: defaultdict[int, defaultdict[int, Parts]]
        self._routed = defaultdict(lambda: defaultdict(dict))
        self._shared: defaultdict[int, Parts] = defaultdict(dict)
        self._dense: defaultdict[int, Parts] = defaultdict(dict)
        self._norms: defaultdict[int, Parts] = defaultdict(dict)
        self.gated_shared = False
        self.sites: set[Site] = set()
        for name in weights.tensors:
            for place in weights.places(name):
                self._sort(name, place)
        self.layers = sorted(self._routed)
        self.dense_layers = sorted(self._dense)
        self.experts = self._one({len(of_layer) for of_layer in self._routed.values()}, "experts")
        routed = [parts for of_layer in self._routed.values() for parts in of_layer.values()]
        self.width = self._width(routed, "experts")
        if self._shared and sorted(self._shared) != self.layers:
            raise weights.error(
                "has shared experts in some of its layers of experts only", "name a whole model's"
            )
        self.shared_width = self._width(self._shared.values(), "shared experts")
        self.dense_width = self._width(self._dense.values(), "dense feed-forwards")

    def _sort(self, name: str, place: Place) -> None:
        """Take note of a tensor that is of a feed-forward, or of the norm in front of one."""
        known, slot = expert_name(name), slot_of(name, place)
        if slot.layer is None:
            return
        tensor, site = _TENSOR.search(slot.name), (name, place)
        if known is not None and known.kind != "expert":
            self.sites.add(site)
        elif known is not None and tensor is not None:
            expert = place[-1] if known.expert is None else known.expert
            self._routed[slot.layer][expert][f"{tensor[1]}.{tensor[2]}"] = site
            self.sites.add(site)
        elif slot.name.startswith(_SHARED):
            self.gated_shared |= slot.name == _GATE
            if tensor is not None:
                self._shared[slot.layer][f"{tensor[1]}.{tensor[2]}"] = site
            self.sites.add(site)
        elif _DENSE.match(slot.name) and tensor is not None:
            self._dense[slot.layer][f"{tensor[1]}.{tensor[2]}"] = site
            self.sites.add(site)
        elif slot.name.startswith(_NORMS):
            self._norms[slot.layer][slot.name.rpartition("_")[2].rpartition(".")[2]] = site

    def _width(self, feed_forwards: Collection[Parts], what: str) -> int:
        widths = set()
        for parts in feed_forwards:
            if not {"1.weight", "2.weight"} <= set(parts):
                raise self._weights.error(
                    f"lacks a matrix of its {what}", "name a whole model's checkpoint"
                )
            name, place = parts["2.weight"]
            widths.add(self._weights.tensors[name].size[len(place) + 1])
        return self._one(widths, f"neurons in its {what}")

    def _one(self, numbers: set[int], what: str) -> int:
        if len(numbers) > 1:
            raise self._weights.error(
                f"has {' and '.join(map(str, sorted(numbers)))} {what}, by layer",
                "name a model whose layers are alike",
            )
        return next(iter(numbers), 0)

    def routed(self, layer: int, expert: int) -> Neurons:
        """An expert."""
        return self._read(self._routed[layer][expert])

    def shared(self, layer: int) -> Neurons:
        """The shared expert."""
        return self._read(self._shared[layer])

    def dense(self, layer: int) -> Neurons:
        """The feed-forward of a layer without experts."""
        return self._read(self._dense[layer])

    def _read(self, parts: Parts) -> Neurons:
        def read(key: str) -> torch.Tensor | None:
            return self._weights.read(*parts[key]) if key in parts else None

        first, second, bias = read("1.weight"), read("2.weight"), read("1.bias")
        assert first is not None, "looked at before"
        assert second is not None, "looked at before"
        width = second.shape[1]
        return Neurons(
            first.unflatten(0, (-1, width)),
            None if bias is None else bias.unflatten(0, (-1, width)),
            second,
            read("2.bias"),
        )

    def norm(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Weight and bias ``[h]`` of the norm in front of a feed-forward; ``None`` where the
        checkpoint has none."""
        parts = self._norms[layer]
        if "weight" not in parts:
            return None
        bias = self._weights.read(*parts["bias"]) if "bias" in parts else None
        return self._weights.read(*parts["weight"]), bias
