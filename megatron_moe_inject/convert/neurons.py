"""Feed-forwards as sets of neurons: what they give, one laid over another, several side by side.

A neuron is a row of the first matrix (of gate and up, where it is gated) and a column of the
second. A feed-forward is the sum of its neurons, in whatever order they stand.

Shapes: h hidden, f neurons, m matrices in the first one (2 where it is gated, else 1), n probes.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Neurons:
    """A feed-forward.

    Attributes:
        first: ``[m, f, h]``, gate in front of up.
        first_bias: ``[m, f]``, or ``None``.
        second: ``[h, f]``.
        second_bias: ``[h]``, or ``None``.
    """

    first: torch.Tensor
    first_bias: torch.Tensor | None
    second: torch.Tensor
    second_bias: torch.Tensor | None

    @property
    def width(self) -> int:
        """f."""
        return self.second.shape[1]

    def to(self, dtype: torch.dtype) -> Neurons:
        """In another precision."""
        return Neurons(
            self.first.to(dtype),
            None if self.first_bias is None else self.first_bias.to(dtype),
            self.second.to(dtype),
            None if self.second_bias is None else self.second_bias.to(dtype),
        )

    def weighed(self, weight: float) -> Neurons:
        """The same with its output times ``weight``."""
        if weight == 1:
            return self
        bias = None if self.second_bias is None else self.second_bias * weight
        return replace(self, second=self.second * weight, second_bias=bias)

    def ordered(self, order: torch.Tensor) -> Neurons:
        """With neuron ``order[i]`` in place i; the same function."""
        bias = None if self.first_bias is None else self.first_bias[:, order]
        return Neurons(self.first[:, order], bias, self.second[:, order], self.second_bias)

    def outputs(self, inputs: torch.Tensor, args: Namespace) -> torch.Tensor:
        """``[n, h]`` of ``[n, h]``.

        Args:
            args: Megatron's, which say how it is activated.
        """
        between = torch.einsum("nh,mfh->mnf", inputs, self.first)
        if self.first_bias is not None:
            between = between + self.first_bias[:, None]
        given = activated(between, args) @ self.second.T
        return given if self.second_bias is None else given + self.second_bias


def activated(between: torch.Tensor, args: Namespace) -> torch.Tensor:
    """``[n, f]`` of ``[m, n, f]``, as Megatron's ``MLP`` does it."""
    clamp = getattr(args, "activation_func_clamp_value", None)
    quick = getattr(args, "quick_geglu", False)
    if len(between) == 1:
        (only,) = between
        if getattr(args, "squared_relu", False):
            return torch.relu(only) ** 2
        return torch.nn.functional.gelu(only)
    gate, up = between
    if clamp is not None:
        gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    up = up + (getattr(args, "glu_linear_offset", None) or 0.0)
    if quick:
        return gate * torch.sigmoid(1.702 * gate) * up
    if getattr(args, "swiglu", False):
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate) * up


def matching(model: Neurons, other: Neurons) -> torch.Tensor:
    """``[f]``: for each neuron of ``model`` the one of ``other`` that is paired with it.

    Pairs are taken where both are each other's most similar of those that are left, by the cosine
    of all their weights; each neuron is in one pair.
    """
    alike = _directions(model) @ _directions(other).T
    pairs = torch.full((model.width,), -1, dtype=torch.long)
    while (pairs < 0).any():
        theirs, ours = alike.argmax(1), alike.argmax(0)
        rows = torch.arange(model.width)
        mutual = (pairs < 0) & (ours[theirs] == rows)
        pairs[mutual] = theirs[mutual]
        alike[mutual] = -torch.inf
        alike[:, theirs[mutual]] = -torch.inf
    return pairs


def _directions(neurons: Neurons) -> torch.Tensor:
    """``[f, (m + 1) h]``, each of length 1 in each matrix."""
    parts = [*neurons.first.float(), neurons.second.float().T]
    unit = [torch.nn.functional.normalize(part, dim=1) for part in parts]
    return torch.cat(unit, dim=1)


class Merging:
    """Feed-forwards of one width averaged neuron by neuron, one after the other.

    Args:
        model: the one whose neurons the others' are paired with, float32.
    """

    def __init__(self, model: Neurons) -> None:
        self._model, self._sum = model, model

    def add(self, other: Neurons, share: float) -> None:
        """Take in ``share`` of another.

        As a difference from the model, so that one that is the same changes nothing.
        """
        ordered = other.to(torch.float32).ordered(matching(self._model, other))

        total, base = self._sum, self._model
        self._sum = Neurons(
            total.first + share * (ordered.first - base.first),
            _mixed(total.first_bias, base.first_bias, ordered.first_bias, share),
            total.second + share * (ordered.second - base.second),
            _mixed(total.second_bias, base.second_bias, ordered.second_bias, share),
        )

    def merged(self) -> Neurons:
        """What has come of it."""
        return self._sum


def _mixed(
    total: torch.Tensor | None,
    base: torch.Tensor | None,
    other: torch.Tensor | None,
    share: float,
) -> torch.Tensor | None:
    if total is None or base is None or other is None:
        return None
    return total + share * (other - base)


def side_by_side(parts: Sequence[Neurons]) -> Neurons:
    """One feed-forward that gives the sum of what these give."""
    biased = [part for part in parts if part.first_bias is not None]
    second = [part.second_bias for part in parts if part.second_bias is not None]
    first_bias = None
    if biased:
        rows = [
            part.first.new_zeros(part.first.shape[:2]) if part.first_bias is None
            else part.first_bias
            for part in parts
        ]  # fmt: skip
        first_bias = torch.cat(rows, dim=1)
    return Neurons(
        torch.cat([part.first for part in parts], dim=1),
        first_bias,
        torch.cat([part.second for part in parts], dim=1),
        torch.stack(second).sum(0) if second else None,
    )


def widened(neurons: Neurons, width: int, deviation: float, generator: torch.Generator) -> Neurons:
    """With more neurons, the function unchanged.

    The new ones have drawn rows, so that they can learn, and columns of zeros, so that they give
    nothing yet.

    Args:
        width: of the result, at least that of ``neurons``.
        deviation: of the drawn rows.
    """
    more = width - neurons.width
    if not more:
        return neurons
    matrices, _, hidden = neurons.first.shape
    drawn = deviation * torch.randn((matrices, more, hidden), generator=generator)
    bias = neurons.first_bias
    return Neurons(
        torch.cat([neurons.first, drawn.to(neurons.first.dtype)], dim=1),
        None if bias is None else torch.cat([bias, bias.new_zeros(matrices, more)], dim=1),
        torch.cat([neurons.second, neurons.second.new_zeros(hidden, more)], dim=1),
        neurons.second_bias,
    )
