"""Low-rank changes of some experts of a grouped linear layer (Megatron's ``TEGroupedMLP``).

Each chosen expert has factors of its own, under its global id. Their products run over the rows of
the chosen experts alone; an expert without rows costs nothing and has a gradient of zero. How many
rows each has is on the host already, so nothing waits. On a GPU with enough experts of one rank the
products are grouped (``torch.nn.functional.grouped_mm``), otherwise one after the other.

Shapes: m rows (tokens times top-k on this rank), n inputs, k outputs, r rank, e chosen experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_moe_inject.adapters.blocks import (
    LabelsOfRows,
    OfDomain,
    joined,
    label_tensor,
    of_own_domain,
    suffixes,
)
from megatron_moe_inject.adapters.low_rank import Sharding, factors, whole_summed
from megatron_moe_inject.host.to_device import to_device

_LEAST_GROUPED = 4
"""Experts from which grouped products pay."""
_MULTIPLE = 8
"""What ``grouped_mm`` wants sizes in bf16 to be multiples of (16 bytes)."""


@dataclass(frozen=True)
class OfExpert:
    """What one expert's change is.

    Attributes:
        local: its number on this rank.
        expert: its global id.
        rank: r.
        scale: s.
        name: the whole matrix's, with global numbers.
        domains: which have factors of their own (``blocks``); none = one pair for all tokens.
    """

    local: int
    expert: int
    rank: int
    scale: float
    name: str
    domains: tuple[OfDomain, ...] = ()

    @property
    def width(self) -> int:
        """Of A x: r, with D domains D r."""
        return self.rank * max(1, len(self.domains))


class GroupedLowRank(torch.nn.Module):
    """The changes of one grouped layer's output.

    Args:
        weights: of the local experts, in order.
        chosen: those that have a change.
        sharding: how the layer is divided.

    Attributes:
        on: whether they act.
        chosen: as given.
        labels: with domains, those of all blocks of the chosen, one after the other.
    """

    labels: torch.Tensor

    def __init__(
        self, weights: Sequence[torch.Tensor], chosen: Sequence[OfExpert], sharding: Sharding
    ) -> None:
        super().__init__()
        for one in chosen:
            for suffix, drawn_by in suffixes(one.domains):
                weight = weights[one.local]
                pair = factors(weight, one.rank, sharding, one.name + drawn_by)
                for factor, parameter in zip("ab", pair, strict=True):
                    self.register_parameter(f"{factor}{one.expert}{suffix}", parameter)
        domains = [domain for one in chosen for domain in one.domains]
        if domains:
            labels = label_tensor(domains, weights[0].device)
            self.register_buffer("labels", labels, persistent=False)
        ends = itertools.accumulate(len(one.domains) for one in chosen)
        self._labels_of = {
            one: slice(end - len(one.domains), end) for one, end in zip(chosen, ends, strict=True)
        }
        self.chosen = tuple(chosen)
        self.on = True
        self._sharding = sharding

    def forward(
        self,
        rows: torch.Tensor,
        counts: Sequence[int],
        output: torch.Tensor,
        row_labels: LabelsOfRows | None = None,
    ) -> torch.Tensor:
        """The layer's output ``[m, k]`` with the changes.

        Args:
            rows: its input ``[m, n]``, by local expert.
            counts: rows of each local expert.
            output: ``[m, k]`` without them.
            row_labels: with domains, gives the domain of each of an expert's rows; see
                ``blocks.LabelsOfRows``.

        Collectives: under expert tensor parallelism two all-reduces of e factors in the backward
        pass; none otherwise.
        """
        ends = list(itertools.accumulate(counts))
        parts = {
            one: slice(ends[one.local] - counts[one.local], ends[one.local]) for one in self.chosen
        }
        pairs = self._pairs()
        if self._grouped(rows):
            changes = grouped_products(rows, parts, pairs, self._others(parts, row_labels))
        else:
            changes = []
            for one, part in parts.items():
                hidden = F.linear(rows[part], pairs[one][0]) * one.scale
                if one.domains:
                    assert row_labels is not None, "whoever makes factors of domains tells rows"
                    labels = row_labels(one.expert, part.stop - part.start)
                    hidden = of_own_domain(hidden, labels, self.labels[self._labels_of[one]])
                changes.append(F.linear(hidden, pairs[one][1]))
        pieces, begun = [], 0
        for part, change in zip(parts.values(), changes, strict=True):
            pieces += [output[begun : part.start], output[part] + change]
            begun = part.stop
        return torch.cat([*pieces, output[begun:]])

    def _others(
        self,
        parts: Mapping[OfExpert, slice],
        row_labels: LabelsOfRows | None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Domains of the rows of the chosen and of the blocks, which all have alike."""
        first = self.chosen[0]
        if not first.domains:
            return None
        assert row_labels is not None, "whoever makes factors of domains tells rows"
        labels = [row_labels(one.expert, part.stop - part.start) for one, part in parts.items()]
        return torch.cat(labels), self.labels[self._labels_of[first]]

    def _pairs(self) -> Mapping[OfExpert, tuple[torch.Tensor, torch.Tensor]]:
        """A and B of each."""
        return {
            one: whole_summed(*joined(self._factors(one)), self._sharding) for one in self.chosen
        }

    def _factors(self, one: OfExpert) -> list[tuple[torch.Tensor, torch.Tensor]]:
        names = [f"{one.expert}{suffix}" for suffix, _ in suffixes(one.domains)]
        return [(self.get_parameter(f"a{name}"), self.get_parameter(f"b{name}")) for name in names]

    def _grouped(self, rows: torch.Tensor) -> bool:
        kinds = {(one.width, one.domains) for one in self.chosen}
        a, b = self._factors(self.chosen[0])[0]
        sizes = (self.chosen[0].width, a.shape[1], b.shape[0])
        return (
            rows.is_cuda
            and rows.dtype == torch.bfloat16
            and len(self.chosen) >= _LEAST_GROUPED
            and len(kinds) == 1
            and not any(size % _MULTIPLE for size in sizes)
            and hasattr(F, "grouped_mm")
        )


def grouped_products(
    rows: torch.Tensor,
    parts: Mapping[OfExpert, slice],
    pairs: Mapping[OfExpert, tuple[torch.Tensor, torch.Tensor]],
    labels: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Sequence[torch.Tensor]:
    """Each expert's change, by two grouped products over the rows of the chosen.

    Args:
        labels: with domains, that of each row of the chosen and of each block of every one.
    """
    lengths = [part.stop - part.start for part in parts.values()]
    ends = to_device(
        torch.tensor(list(itertools.accumulate(lengths)), dtype=torch.int32), rows.device
    )
    chosen = torch.cat([rows[part] for part in parts.values()])
    first = torch.stack([a for a, _ in pairs.values()]).transpose(-2, -1)
    second = torch.stack([b * one.scale for one, (_, b) in pairs.items()]).transpose(-2, -1)
    hidden = F.grouped_mm(chosen, first, offs=ends)
    if labels is not None:
        hidden = of_own_domain(hidden, *labels)
    return F.grouped_mm(hidden, second, offs=ends).split(lengths)
