"""What new experts and their routers' rows begin as.

Shapes: E experts of a layer, n new ones, h hidden.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_moe_inject.experts.grow.feed_forwards import TeacherNeurons
from megatron_moe_inject.experts.grow.numbering import Numbering
from megatron_moe_inject.experts.grow.stored_names import ExpertName, Layer

WEIGHTS = ("copy", "mean", "random")
"""Words of ``--weights``, which takes a teacher's source as well."""
ROWS = ("closed", "mean", "donor")
"""Words of ``--rows``."""
ZERO_STATES = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""States of an optimizer that begin as zeros."""
MAIN_STATES = ("fp32_param", "param")
"""States of an optimizer that are a parameter in higher precision."""
FAR = -1e4
"""A bias that no score makes up for."""
_BELOW = 1.25
"""How far below the least expert bias of a layer a closed expert has its own. A sigmoid is at most
1, so even the highest score of a new expert stays below the lowest of an old one."""


@dataclass(frozen=True)
class NewWeights:
    """How the weights of new experts begin.

    Attributes:
        numbering: old and new ids.
        method: a word of ``WEIGHTS``.
        donors: by layer the old ids that its new experts are copied from, in the order of
            ``numbering.new``; layers that are filled up are copied from these too, whatever the
            method.
        filled: layers that are filled up.
        noise: standard deviation of what is added, in that of the expert's tensor.
        seed: of random numbers.
        neurons: of a dense teacher, where ``method`` names one.
        deviation: of random weights of the first matrix, as Megatron begins them.
        layers: of the model; the second matrix begins with ``deviation / sqrt(2 * layers)``.
    """

    numbering: Numbering
    method: str
    donors: Mapping[Layer, Sequence[int]]
    filled: frozenset[Layer]
    noise: float
    seed: int
    deviation: float
    layers: int
    neurons: TeacherNeurons | None = None

    def copied_from(self, layer: Layer, number: int) -> int | None:
        """The old id whose bytes the new expert ``numbering.new[number]`` has; ``None`` where it
        has values of its own."""
        if layer in self.filled or (self.method == "copy" and not self.noise):
            return self.donors[layer][number]
        return None

    def values(
        self, name: ExpertName, layer: Layer, read: Callable[[int], torch.Tensor]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """New experts of a layer that have values of their own, by number, each with its tensor.

        Args:
            name: of a model's tensor.
            layer: of the model.
            read: gives an old expert's.
        """
        numbers = [n for n in range(len(self.numbering.new)) if self.copied_from(layer, n) is None]
        mean = None
        if numbers and self.method == "mean":
            mean = _mean(read(e) for e in range(len(self.numbering.moved)))
        for number in numbers:
            generator = self._generator(name, layer, number)
            if self.method == "random":
                yield number, self._random(name, read(0), generator)
                continue
            if self.neurons is not None:
                tensor = name.key.rpartition(".experts.experts.")[2]
                tensor = tensor[tensor.index("linear_fc") :]
                value = self.neurons.value(tensor, layer[1], number, read(0))
            else:
                value = read(self.donors[layer][number]) if mean is None else mean
            if self.noise:
                spread = self.noise * float(value.float().std())
                drawn = torch.randn(value.shape, generator=generator)
                value = (value.float() + spread * drawn).to(value.dtype)
            yield number, value

    def _random(
        self, name: ExpertName, like: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        if not name.key.endswith("weight"):
            return torch.zeros_like(like)
        second = "linear_fc2" in name.key
        deviation = self.deviation / (math.sqrt(2 * self.layers) if second else 1)
        return (deviation * torch.randn(like.shape, generator=generator)).to(like.dtype)

    def _generator(self, name: ExpertName, layer: Layer, number: int) -> torch.Generator:
        """Random numbers that depend on the tensor, its layer and the expert alone."""
        tensor = name.key.rpartition(".experts.experts.")[2].rpartition("linear_fc")[2]
        text = f"{self.seed} {tensor} {layer} {number}"
        seed = int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)
        return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class NewRows:
    """How rows of routers, and their biases, begin for new experts.

    Attributes:
        numbering: old and new ids.
        method: a word of ``ROWS``.
        closes_by: the kind of tensor that closes an expert, ``expert_bias`` or ``bias``; ``None``
            of routers without any.
        score_function: Megatron's.
        donors: as of ``NewWeights``.
        copied: whether the weights are their donors'; the row of a closed expert is then its
            donor's, else the mean.
        filled: layers that are filled up: closed where they can be, else ``mean``.
    """

    numbering: Numbering
    method: str
    closes_by: str | None
    score_function: str
    donors: Mapping[Layer, Sequence[int]]
    copied: bool
    filled: frozenset[Layer]

    def in_layer(self, layer: Layer) -> str:
        """How they begin there."""
        if layer not in self.filled:
            return self.method
        return "closed" if self.closes_by else "mean"

    def __call__(self, name: ExpertName, layer: Layer, old: torch.Tensor) -> torch.Tensor:
        """``[E + n, ...]`` from ``[E, ...]``; see ``moving.RouterChange``."""
        numbering = self.numbering
        grown = old.new_zeros((numbering.experts, *old.shape[1:]))
        grown[list(numbering.moved)] = old
        if name.state not in ZERO_STATES:
            grown[list(numbering.new)] = self._new(name, layer, old)
        return grown

    def _new(self, name: ExpertName, layer: Layer, old: torch.Tensor) -> torch.Tensor:
        """``[n, ...]``."""
        method = self.in_layer(layer)
        if method == "closed" and name.kind == self.closes_by:
            bounded = name.kind == "expert_bias" and self.score_function == "sigmoid"
            value = float(old.min()) - _BELOW if bounded else FAR
            return old.new_full((len(self.numbering.new), *old.shape[1:]), value)
        if method == "donor" or (method == "closed" and self.copied and layer not in self.filled):
            return old[list(self.donors[layer])]
        return old.float().mean(0).to(old.dtype).expand(len(self.numbering.new), *old.shape[1:])


def _mean(values: Iterator[torch.Tensor]) -> torch.Tensor:
    """In float32, one value in memory beside it."""
    first = next(values)
    total, count = first.float().clone(), 1
    for value in values:
        total.add_(value.float())
        count += 1
    return total.div_(count).to(first.dtype)
