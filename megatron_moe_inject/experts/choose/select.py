"""Which experts a domain's knowledge goes to: from scores to expert ids, layer by layer.

A score ``[L, E]`` says how much an expert matters: its share of the routing choices, its share of
the gate weights, or its contrast with general data. A rule decides how many experts of each layer
are taken: until their shares reach a threshold, a number per layer, or a budget over all layers.
Only experts with a positive score are ever chosen.

The threshold on the token score is ESFT's rule (Wang et al., arXiv 2407.01906); normalised per
layer and rounded to 4 digits it gives the published choices. Sums of rounded shares are compared
as whole numbers of 1e-4, so that 0.1 + 0.1 reaches 0.2 whatever the order.

Under expert parallelism a layer is as slow as the rank with the most trained experts. With ``ep``
a layer's experts are taken in rounds, the best of every rank before the second best of any, so
that two ranks differ by at most one chosen expert as long as each has enough with a score.

Shapes: L MoE layers, E experts. Scores are anything numpy reads, or a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_moe_inject.host.errors import (
    RecipeError,
    fail,
    show,
)

_UNIT = 10_000
"""Shares are rounded to 1 / _UNIT before they are compared with a threshold."""


@dataclass(frozen=True)
class Limits:
    """Constraints on the experts of each layer.

    Attributes:
        at_least: fewest experts per layer.
        at_most: most experts per layer; None = no limit.
        ep: expert-parallel ranks over which the choice is spread; Megatron keeps experts
            ``r * E / ep`` up to ``(r + 1) * E / ep`` on rank ``r``. 1 = no spreading.
    """

    at_least: int = 0
    at_most: int | None = None
    ep: int = 1

    def clamp(self, count: int) -> int:
        """The nearest allowed number of experts."""
        count = max(count, self.at_least)
        return count if self.at_most is None else min(count, self.at_most)


_FREE = Limits()


def select_experts(scores: Any, *, threshold: float) -> list[list[int]]:
    """Per layer, the fewest experts whose shares of the layer's score reach ``threshold``.

    Args:
        scores: ``[L, E]``, not negative, unnormalised.
        threshold: above 0, at most 1.

    Returns:
        Per layer, expert ids in falling order of their share, rounded to 4 digits; of equal
        shares the lower id comes first. Where rounding keeps the sum of all shares below the
        threshold, every expert with a positive score.

    Raises:
        RecipeError: a threshold out of range; scores that are not a matrix, negative or not
            finite; a layer without a positive score.
    """
    return by_threshold(scores, threshold=threshold)


def by_threshold(
    scores: Any,
    *,
    threshold: float,
    limits: Limits = _FREE,
    layers: Sequence[int] | None = None,
) -> list[list[int]]:
    """``select_experts`` with constraints; ``at_most`` may keep a layer below the threshold.

    Args:
        layers: names of the rows in messages; None = 0, 1, ...

    Raises:
        RecipeError: as ``select_experts``, or constraints that a layer cannot meet.
    """
    if not 0 < threshold <= 1:
        raise fail("threshold", threshold, "is not in (0, 1]", "write a share such as 0.2")
    chosen = []
    for name, row in _named(scores, layers, limits):
        units = np.rint(row / row.sum() * _UNIT)
        order = _ranking(units, row > 0, limits.ep)
        _check_supply(name, order, limits.at_least)
        reached = np.searchsorted(np.cumsum(units[order]), threshold * _UNIT - 1e-6) + 1
        chosen.append(order[: limits.clamp(min(int(reached), len(order)))])
    return chosen


def by_count(
    scores: Any, *, n: int, limits: Limits = _FREE, layers: Sequence[int] | None = None
) -> list[list[int]]:
    """Per layer, the ``n`` experts with the highest scores, of equal ones the lower id.

    Raises:
        RecipeError: wrong scores or constraints, or a layer with fewer than ``n`` experts that
            have a positive score.
    """
    if n < 1 or limits.clamp(n) != n:
        bounds = f"at_least is {limits.at_least}, at_most {limits.at_most}"
        raise fail("n", n, "is outside the limits", bounds)
    chosen = []
    for name, row in _named(scores, layers, limits):
        order = _ranking(row, row > 0, limits.ep)
        _check_supply(name, order, n)
        chosen.append(order[:n])
    return chosen


def by_budget(
    scores: Any, *, experts: int, limits: Limits = _FREE, layers: Sequence[int] | None = None
) -> list[list[int]]:
    """At most ``experts`` experts over all layers, where they add most to the sum of the scores.

    All routed experts of a model have the same size, so a budget of parameters is one of experts.
    Each layer first gets ``at_least``; what is left goes to the highest scores of any layer.
    Spread over ranks, a layer's next expert may score less than the one after it; such stretches
    compete by their mean, which keeps the choice greedy by score per expert.

    Args:
        scores: ``[L, E]``, comparable between layers, such as shares.

    Raises:
        RecipeError: wrong scores or constraints, or a budget below one expert or below
            ``at_least`` for every layer.
    """
    rows = _named(scores, layers, limits)
    needed = max(1, limits.at_least * len(rows))
    if experts < needed:
        raise fail(
            "budget", experts, "experts are too few", f"{needed} are needed: raise it or at_least"
        )
    orders, offers = [], []
    for index, (name, row) in enumerate(rows):
        order = _ranking(row, row > 0, limits.ep)
        _check_supply(name, order, limits.at_least)
        orders.append(order)
        gains = _falling_means(row[order[limits.at_least : limits.at_most]])
        offers += [(-gain, index) for gain in gains]
    offers.sort()
    counts = [limits.at_least] * len(rows)
    for _, index in offers[: experts - limits.at_least * len(rows)]:
        counts[index] += 1
    return [order[:count] for order, count in zip(orders, counts, strict=True)]


def contrast(domain: Any, general: Any) -> np.ndarray:
    """How much more a domain uses each expert than general data does: ``p * log(p / q)``, in nats.

    ``p`` and ``q`` are the expert's shares of the routing choices on the domain and on general
    data. The sum over a layer is the divergence KL(p || q) of its routing, so a score is what the
    expert contributes to telling the domain from everything else. Against the difference
    ``p - q`` it prefers, of two experts with the same excess, the one general data needs less;
    against the ratio ``p / q`` it does not fall for experts that nobody uses.

    Both counts are smoothed by one choice per expert, so that an expert general data never chose
    in N choices has q = 1 / (N + E): seeing more general data without it raises its score.
    An expert that the domain never chose scores 0.

    Args:
        domain, general: ``[L, E]``, numbers of routing choices.

    Returns:
        float64 ``[L, E]``, negative where general data uses the expert more.
    """
    domain, general = _matrix(domain), _matrix(general)
    p, q = _smoothed(domain), _smoothed(general)
    return np.where(domain > 0, p * np.log(p / q), 0.0)


def contrast_error(
    domain: Any, general: Any, domain_error: np.ndarray, general_error: np.ndarray
) -> np.ndarray:
    """Standard error ``[L, E]`` of ``contrast``, to first order.

    Args:
        domain_error, general_error: standard errors ``[L, E]`` of the shares.
    """
    p, q = _smoothed(_matrix(domain)), _smoothed(_matrix(general))
    return np.hypot((np.log(p / q) + 1) * domain_error, p / q * general_error)


def _smoothed(counts: np.ndarray) -> np.ndarray:
    return (counts + 1) / (counts.sum(axis=1, keepdims=True) + counts.shape[1])


def _matrix(scores: Any) -> np.ndarray:
    """Scores as float64 ``[L, E]``."""
    if hasattr(scores, "detach"):
        scores = scores.detach().cpu().double().numpy()
    try:
        matrix = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError):
        raise RecipeError("scores: not a matrix of numbers; give [layers, experts]") from None
    if matrix.ndim != 2:
        raise RecipeError(f"scores: shape {list(matrix.shape)}; give [layers, experts]")
    return matrix


def _named(
    scores: Any, layers: Sequence[int] | None, limits: Limits
) -> list[tuple[int, np.ndarray]]:
    """Checked rows of scores with their names."""
    matrix = _matrix(scores)
    experts = matrix.shape[1]
    if limits.at_most is not None and not max(1, limits.at_least) <= limits.at_most:
        raise fail("at_most", limits.at_most, "is too small", f"at_least is {limits.at_least}")
    if limits.ep < 1 or experts % limits.ep:
        raise fail("ep", limits.ep, f"does not divide {experts} experts", "give the EP size")
    names = range(len(matrix)) if layers is None else layers
    for name, row in zip(names, matrix, strict=True):
        with np.errstate(over="ignore"):
            total = row.sum()
        if not np.isfinite(total):
            raise RecipeError(f"layer {name}: a score is not finite; scores are sums of counts")
        if (row < 0).any():
            raise RecipeError(f"layer {name}: score {show(float(row.min()))} is negative")
        if not row.any():
            raise RecipeError(
                f"layer {name}: no expert has a score; use a profile with more tokens, or leave "
                "the layer out"
            )
    return list(zip(names, matrix, strict=True))


def _check_supply(name: int, order: list[int], needed: int) -> None:
    if needed > len(order):
        raise RecipeError(
            f"layer {name}: {needed} experts are asked for, but only {len(order)} have a score; "
            "lower at_least or n"
        )


def _ranking(values: np.ndarray, eligible: np.ndarray, ep: int) -> list[int]:
    """Eligible ids by falling value, lower ids first; with ``ep``, by rounds over the ranks."""
    order = [int(e) for e in np.argsort(-values, kind="stable") if eligible[e]]
    if ep == 1:
        return order
    per_rank = len(values) // ep
    seen = [0] * ep
    rounds = {}
    for expert in order:
        rank = expert // per_rank
        rounds[expert] = seen[rank]
        seen[rank] += 1
    return sorted(order, key=rounds.__getitem__)


def _falling_means(gains: np.ndarray) -> list[float]:
    """Slopes of the least concave curve above the running sum of ``gains``."""
    blocks: list[tuple[float, int]] = []
    for gain in gains.tolist():
        total, size = gain, 1
        while blocks and blocks[-1][0] * size < total * blocks[-1][1]:
            before, count = blocks.pop()
            total, size = total + before, size + count
        blocks.append((total, size))
    return [total / size for total, size in blocks for _ in range(size)]
