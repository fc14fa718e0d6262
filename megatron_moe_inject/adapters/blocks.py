"""Factors side by side: each domain's own, of which a token passes those of its domain alone.

With D domains A is ``[D r, n]`` and B ``[k, D r]``, one block for each domain. Of A x
``[..., D r]`` the blocks of other domains are set to zero, token by token, before B. So a token's
output has nothing of another domain's factors, whose gradient from it is exactly zero, and a token
of no domain with a block, as those of general text are, has the layer's own output.

Every block is a parameter of its own, drawn by the name of its domain: it begins, is stored and is
exported as it would be without the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

LabelsAt = Callable[[Sequence[int]], torch.Tensor]
"""Gives the domain of each token that passes a place, int64 ``[l, b]`` of states ``[l, b, ...]``
whose leading sizes it gets, or ``[t]`` of ``[t, ...]``; to be called once in each pass."""
LabelsOfRows = Callable[[int, int], torch.Tensor]
"""Gives the domain of each of the rows of a local expert, ``[c]``, by its global id and c, which
may count rows of padding at the end."""


@dataclass(frozen=True)
class OfDomain:
    """The domain that factors are for.

    Attributes:
        label: what its tokens are told by: its position in the recipe.
        name: by which its factors are drawn.
    """

    label: int
    name: str


def suffixes(domains: Sequence[OfDomain]) -> list[tuple[str, str]]:
    """What the names of each block's parameters end in, and that which it is drawn by; of no
    domain, one block for all tokens."""
    return [(f"_{domain.label}", f":{domain.name}") for domain in domains] or [("", "")]


def label_tensor(domains: Sequence[OfDomain], device: torch.device) -> torch.Tensor:
    """The labels of blocks, int64 ``[D]``."""
    return torch.tensor([d.label for d in domains], dtype=torch.int64, device=device)


def joined(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``[D r, n]`` and B ``[k, D r]`` of the blocks."""
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)


def of_own_domain(
    hidden: torch.Tensor, token_labels: torch.Tensor, block_labels: torch.Tensor
) -> torch.Tensor:
    """A x with zeros in the blocks of other domains than a token's.

    Args:
        hidden: ``[..., D r]``.
        token_labels: ``[...]``, the domain of each token.
        block_labels: ``[D]``, that of each block.
    """
    others = token_labels.unsqueeze(-1) != block_labels
    blocks = hidden.unflatten(-1, (len(block_labels), -1))
    return blocks.masked_fill(others.unsqueeze(-1), 0.0).flatten(-2)
