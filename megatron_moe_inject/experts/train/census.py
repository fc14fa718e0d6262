"""How many parameters train, by component and rank, each element of the model counted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject.host.model_parts import (
    COMPONENTS,
    ParameterPlace,
    counts_here,
    places,
)
from megatron_moe_inject.recipe.plan import ParameterRow


def _all_places(
    chunks: Iterable[torch.nn.Module],
) -> Iterator[tuple[ParameterPlace, torch.nn.Parameter]]:
    for chunk in chunks:
        yield from places(chunk)


def parameter_rows(chunks: Iterable[torch.nn.Module], groups: Any) -> list[ParameterRow]:
    """One row per component that the model has, in the order of ``COMPONENTS``.

    Args:
        chunks: this rank's bare model chunks, policy applied.
        groups: the student's ``ProcessGroupCollection``.

    Collectives: one all-gather of three small counters over the whole world.
    """
    trained, frozen, here = Counter(), Counter(), Counter()
    for place, parameter in _all_places(chunks):
        if parameter.requires_grad:
            here[place.component] += parameter.numel()
        if counts_here(parameter, groups):
            counter = trained if parameter.requires_grad else frozen
            counter[place.component] += parameter.numel()
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (trained, frozen, here))
    rows = [
        ParameterRow(
            component,
            trained=sum(t[component] for t, _, _ in ranks),
            frozen=sum(f[component] for _, f, _ in ranks),
            per_rank=[h[component] for _, _, h in ranks],
        )
        for component in COMPONENTS
    ]
    return [row for row in rows if row.trained or row.frozen]
