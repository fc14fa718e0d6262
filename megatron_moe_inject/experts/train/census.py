"""How many parameters train, by component and rank, each element of the model counted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_moe_inject.host.agreement import of_each_rank, totals
from megatron_moe_inject.host.megatron_types import Chunk, Groups
from megatron_moe_inject.host.model_parts import (
    COMPONENTS,
    ParameterPlace,
    counts_here,
    places,
)
from megatron_moe_inject.host.text import count, table


@dataclass(frozen=True)
class ParameterRow:
    """Parameters of one component, counted over the whole model.

    Attributes:
        component: a name such as ``experts`` or ``attention``.
        trained: elements that train, each counted once whatever the parallel layout.
        frozen: elements that do not.
        per_rank: elements that train on each rank, in rank order.
    """

    component: str
    trained: int
    frozen: int
    per_rank: Sequence[int] = ()


def _all_places(
    chunks: Iterable[Chunk],
) -> Iterator[tuple[ParameterPlace, torch.nn.Parameter]]:
    for chunk in chunks:
        yield from places(chunk)


def parameter_rows(chunks: Iterable[Chunk], groups: Groups) -> list[ParameterRow]:
    """One row per component that the model has, in the order of ``COMPONENTS``.

    Args:
        chunks: this rank's bare model chunks, policy applied.
        groups: the student's ``ProcessGroupCollection``.

    Collectives: one all-reduce and one all-gather of a few numbers for each component over the
    whole world.
    """
    trained: Counter[str] = Counter()
    frozen: Counter[str] = Counter()
    on_rank: Counter[str] = Counter()
    for place, parameter in _all_places(chunks):
        if parameter.requires_grad:
            on_rank[place.component] += parameter.numel()
        if counts_here(parameter, groups):
            counter = trained if parameter.requires_grad else frozen
            counter[place.component] += parameter.numel()
    sums = totals([counter[component] for component in COMPONENTS for counter in (trained, frozen)])
    ranks = of_each_rank([on_rank[component] for component in COMPONENTS])
    rows = [
        ParameterRow(component, sums[2 * i], sums[2 * i + 1], [rank[i] for rank in ranks])
        for i, component in enumerate(COMPONENTS)
    ]
    return [row for row in rows if row.trained or row.frozen]


def parameter_table(rows: Sequence[ParameterRow]) -> list[str]:
    """The rows and their sum as lines of a plan."""
    total = ParameterRow(
        "total",
        sum(row.trained for row in rows),
        sum(row.frozen for row in rows),
        [sum(column) for column in zip(*(row.per_rank for row in rows), strict=True)],
    )
    header = ("component", "trained", "frozen", "trained per rank")
    return table([header, *map(_cells, (*rows, total))], right=(1, 2))


def _cells(row: ParameterRow) -> tuple[str, str, str, str]:
    ranks = list(row.per_rank)
    if not ranks:
        spread = ""
    elif len(set(ranks)) == 1:
        spread = count(ranks[0])
    else:
        spread = f"{count(min(ranks))} to {count(max(ranks))}"
        if 0 in ranks:
            spread += f" (nothing on {ranks.count(0)} of {len(ranks)} ranks)"
    return row.component, count(row.trained), count(row.frozen), spread
