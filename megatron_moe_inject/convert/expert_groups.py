"""Which experts of a layer make up one dense feed-forward, and with which weights.

A layer of experts gives sum_e g_e(x) f_e(x), with gates g_e that are 0 for all but k experts. A
dense feed-forward made of the neurons of several experts gives sum_j a_j f_j(x), with weights a_j
that do not depend on the token. The best constant in the place of a gate is its mean, which a
routing profile knows; what an expert gives is known from its outputs on probes, drawn inputs that
have been through the layer's norm. From both follow the scores, which of the experts are kept, and
how large the output is to be.

Choosing experts that differ, rather than the highest scores alone, is the idea of 2605.28207, which
takes those whose weighted outputs span the largest volume (D-optimal); here that is greedy.

Shapes: E experts of a layer, K that are kept, n numbers of an expert's outputs on all probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

METHODS = ("concatenate", "merge", "keep")
"""Words of ``--method``."""
SCORES = ("output", "gate", "token")
"""Words of ``--score``."""
SCALES = ("expected", "norm")
"""Words of ``--scale``."""
_RIDGE = 1e-9


@dataclass(frozen=True)
class Gates:
    """What is known of a layer's gates, float64.

    Attributes:
        mean: ``[E]``, mean weight of an expert's output over all tokens, 0 where it is not chosen.
        chosen: ``[E]``, share of the tokens that choose it.
        together: ``[E, E]``, share of the tokens that choose both; the diagonal is not read.
    """

    mean: torch.Tensor
    chosen: torch.Tensor
    together: torch.Tensor

    @classmethod
    def uniform(cls, experts: int, topk: int, total: float) -> Gates:
        """Those of a router that chooses all experts alike; a token's gates sum to ``total``."""
        pairs = topk * (topk - 1) / (experts * max(experts - 1, 1))
        return cls(
            torch.full((experts,), total / experts, dtype=torch.float64),
            torch.full((experts,), topk / experts, dtype=torch.float64),
            torch.full((experts, experts), pairs, dtype=torch.float64),
        )


@dataclass(frozen=True)
class Group:
    """Experts that become one block of the dense feed-forward.

    Attributes:
        members: their ids; the first is the one that the block is made of, or made like.
        shares: of each member in the block, which sum to 1.
        weight: of the block in the layer's output.
    """

    members: tuple[int, ...]
    shares: tuple[float, ...]
    weight: float


def scores(word: str, gates: Gates, gram: torch.Tensor) -> torch.Tensor:
    """How much each expert matters, ``[E]``.

    Args:
        word: one of ``SCORES``: the mean gate times the outputs' norm, the mean gate, or the share
            of tokens.
        gram: ``[E, E]``, products of the experts' outputs.
    """
    if word == "output":
        return gates.mean * gram.diagonal().clamp(min=0).sqrt()
    return gates.mean if word == "gate" else gates.chosen


def cosines(gram: torch.Tensor) -> torch.Tensor:
    """``[E, E]`` of outputs; 0 for an expert that gives nothing."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    scale = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    return gram * scale[:, None] * scale


def most_different(kernel: torch.Tensor, count: int) -> list[int]:
    """Greedily those whose part of ``kernel`` has the largest determinant, in the order taken.

    Args:
        kernel: ``[E, E]``, positive semidefinite.
        count: how many, at most E.
    """
    left = kernel.diagonal().clone()
    left += _RIDGE * max(float(left.mean()), torch.finfo(left.dtype).tiny)
    rows = kernel.new_zeros(count, len(kernel))
    taken: list[int] = []
    for number in range(count):
        left[taken] = -1
        best = int(left.argmax())
        shared = kernel[best] - rows[:number, best] @ rows[:number]
        rows[number] = shared / float(left[best].clamp(min=torch.finfo(left.dtype).tiny)) ** 0.5
        left = left - rows[number] ** 2
        taken.append(best)
    return taken


def grouped(method: str, score: str, gates: Gates, gram: torch.Tensor, count: int) -> list[Group]:
    """The blocks of a dense feed-forward, by the id of their first member.

    Args:
        method: one of ``METHODS``. ``keep`` takes the highest scores, and deals out the weight of
            the others in proportion; the others take experts that differ, and give the weight of
            what is not taken to the expert that is most like it, with its weights (``merge``) or
            without.
        score: one of ``SCORES``.
        gram: ``[E, E]``, products of the experts' outputs, float64.
        count: K.
    """
    value = scores(score, gates, gram)
    if method == "keep":
        order = torch.argsort(value, descending=True, stable=True)[:count]
        kept = sorted(order.tolist())
        total, part = float(gates.mean.sum()), float(gates.mean[kept].sum())
        share = total / part if part else 0.0
        return [Group((expert,), (1.0,), float(gates.mean[expert]) * share) for expert in kept]
    alike = cosines(gram)
    kept = sorted(most_different(alike * value[:, None] * value, count))
    nearest = alike[:, kept].argmax(1).tolist()
    groups = []
    for number, expert in enumerate(kept):
        others = [e for e, at in enumerate(nearest) if at == number and e not in kept]
        weight = sum(float(gates.mean[e]) for e in (expert, *others))
        members = (expert, *others) if method == "merge" and weight else (expert,)
        shares = _shares([float(gates.mean[e]) for e in members])
        groups.append(Group(members, shares, weight))
    return groups


def _shares(parts: Sequence[float]) -> tuple[float, ...]:
    if len(parts) == 1:
        return (1.0,)
    return tuple(part / sum(parts) for part in parts)


def squared_norm(gates: Gates, gram: torch.Tensor) -> float:
    """Mean square of the layer's output, where the gates of a token do not depend on its input
    beyond which experts are chosen, and are what they are on average where they are chosen."""
    given = torch.where(gates.chosen > 0, gates.mean / gates.chosen, torch.zeros_like(gates.mean))
    pairs = gates.together.clone()
    pairs.diagonal().copy_(gates.chosen)
    return float((pairs * gram * given[:, None] * given).sum())
