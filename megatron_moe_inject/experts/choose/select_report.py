"""What ``moe-inject select`` shows of a choice: tables, a recipe fragment, a heat map.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_moe_inject.experts.choose.choice import contrast_scores
from megatron_moe_inject.experts.choose.routing_profile import (
    GENERAL_CLASS,
    ClassStatistics,
    RoutingProfile,
)
from megatron_moe_inject.experts.choose.select import contrast_error
from megatron_moe_inject.host.errors import (
    listing,
)
from megatron_moe_inject.host.heat_map import Panel, heat_map
from megatron_moe_inject.host.text import (
    count,
    ranges,
    table,
)

_SHOWN = 12


@dataclass(frozen=True)
class Choice:
    """A choice to report.

    Attributes:
        profile: what it was made from.
        domain: class of the profile that the experts are for.
        layers: decoder layer -> expert ids in the order they were taken.
        origin: how they were chosen, on one line.
        ep: expert-parallel ranks; 1 = not looked at.
        shortened: layers that ``at_most`` kept below the threshold.
    """

    profile: RoutingProfile
    domain: str
    layers: Mapping[int, Sequence[int]]
    origin: str
    ep: int = 1
    shortened: Sequence[int] = ()

    @property
    def statistics(self) -> ClassStatistics:
        """Of the domain."""
        return self.profile.classes[self.domain]

    @property
    def general(self) -> ClassStatistics | None:
        """Of general data, where the profile has it."""
        return self.profile.classes.get(GENERAL_CLASS)

    def rows(self) -> list[tuple[int, int, list[int]]]:
        """``(layer, row of the arrays, expert ids)`` of every layer with a choice."""
        known = self.profile.provenance.moe_layers
        return [(layer, known.index(layer), list(ids)) for layer, ids in self.layers.items()]


def summary(choice: Choice) -> list[str]:
    """What was chosen, in two lines."""
    provenance = choice.profile.provenance
    layers, experts = provenance.shape
    total = sum(len(ids) for ids in choice.layers.values())
    size = total * provenance.expert_parameters
    return [
        choice.origin,
        f"{total} of {layers * experts} experts ({_percent(total / (layers * experts))}) in "
        f"{len(choice.layers)} of {layers} MoE layers: {count(size)} parameters, "
        f"{_percent(size / provenance.parameters)} of the model",
    ]


def layer_table(choice: Choice) -> list[str]:
    """One line per layer: how much of the domain, and of general data, its choice carries."""
    statistics, general = choice.statistics, choice.general
    tokens, gates = statistics.selection_share(), statistics.gate_share()
    certainty = _certainty(choice)
    rows = [["layer", "n", "tokens", "gates", "general", "lift", "least z", "experts"]]
    for layer, row, ids in choice.rows():
        share = tokens[row, ids].sum()
        cells = [str(layer), str(len(ids)), _percent(share), _percent(gates[row, ids].sum())]
        if general is not None:
            other = general.selection_share()[row, ids].sum()
            cells += [_percent(other), _ratio(share, other)]
        else:
            cells += ["", ""]
        cells.append("" if certainty is None else f"{certainty[row, ids].min():.1f}")
        cells.append(listing(ids, limit=_SHOWN))
        rows.append(cells)
    lines = _without_empty(rows)
    notes = ["tokens, gates: share of the domain's routing choices and gate weights"]
    if general is not None:
        notes.append("general: share of general data's choices; lift: tokens / general")
    if certainty is not None:
        notes.append(
            "least z: standard errors by which the least certain of the experts is above general"
        )
    return [*lines, "", *notes, *_remarks(choice)]


def new_table(choice: Choice) -> list[str]:
    """One line per layer with new experts: what of the domain, and of general data, goes to them;
    nothing where there are none."""
    provenance = choice.profile.provenance
    if provenance.new_experts is None:
        return []
    header = ["layer", "new", f"of {choice.domain}"]
    rows = [header if choice.general is None else [*header, "of general"]]
    for layer, ids in provenance.new_experts.items():
        row = provenance.moe_layers.index(layer)
        found = [s for s in (choice.statistics, choice.general) if s is not None]
        shares = [_percent(statistics.selection_share()[row, ids].sum()) for statistics in found]
        rows.append([str(layer), ranges(ids), *shares])
    return [*table(rows, right=(0, 2, 3)), "", "new: share of the choices that go to new experts"]


def expert_table(choice: Choice) -> list[str]:
    """One line per chosen expert, with standard errors over sequences where recorded."""
    statistics, general = choice.statistics, choice.general
    tokens, gates, errors = (
        statistics.selection_share(),
        statistics.gate_share(),
        statistics.share_error(),
    )
    certainty = _certainty(choice)
    rows = [["layer", "expert", "tokens", "gates", "general", "lift", "contrast [nats]", "z"]]
    score_errors = None
    if general is not None:
        others, general_errors = general.selection_share(), general.share_error()
        scores = contrast_scores(choice.profile, statistics)
        if errors is not None and general_errors is not None:
            counts = statistics.selections, general.selections
            score_errors = contrast_error(*counts, errors, general_errors)
    for layer, row, ids in choice.rows():
        for expert in ids:
            at = row, expert
            cells = [str(layer), str(expert), _percent(tokens[at], errors, at)]
            cells.append(_percent(gates[at]))
            if general is None:
                cells += ["", "", ""]
            else:
                cells += [_percent(others[at], general_errors, at), _ratio(tokens[at], others[at])]
                error = "" if score_errors is None else f" ± {score_errors[at]:.4f}"
                cells.append(f"{scores[at]:.4f}{error}")
            cells.append("" if certainty is None else f"{certainty[at]:.1f}")
            rows.append(cells)
    return _without_empty(rows)


_NUMBERS = "write layer_numbers: hybrid at the top of the recipe"


def fragment(choice: Choice) -> str:
    """YAML that goes under one of a recipe's domains."""
    provenance = choice.profile.provenance
    student = provenance.checkpoint or "a random start"
    pattern = provenance.pattern
    lines = [
        f"    # {json.dumps(choice.domain)} by moe-inject select; the student was {student} at "
        f"iteration {provenance.first_iteration}",
        *([] if pattern is None else [f"    # layers of {pattern.symbols}: {_NUMBERS}"]),
        "    experts:",
        f"      origin: {json.dumps(choice.origin)}",
        "      layers:",
        *(f"        {layer}: {sorted(ids)}" for layer, ids in choice.layers.items()),
    ]
    return "\n".join(lines) + "\n"


def picture(choice: Choice) -> bytes:
    """PNG: the domain's shares, and its excess over general data where known; choice marked.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    layers, experts = choice.profile.provenance.shape
    share = choice.statistics.selection_share()
    unit = "in units of an even share"
    panels = [Panel(f"{choice.domain}: share of routing choices, {unit}", share * experts)]
    if choice.general is not None:
        excess = share - choice.general.selection_share()
        title = f"{choice.domain} minus general, {unit}"
        panels.append(Panel(title, excess * experts, signed=True))
    total = sum(len(ids) for ids in choice.layers.values())
    title = f"{choice.domain}: {total} of {layers * experts} experts chosen (marked)"
    return heat_map(panels, choice.profile.provenance.moe_layers, choice.layers, title)


def _certainty(choice: Choice) -> np.ndarray | None:
    """``[L, E]`` (share - general share) / standard error; None without both spreads."""
    if choice.general is None:
        return None
    error, general_error = choice.statistics.share_error(), choice.general.share_error()
    if error is None or general_error is None:
        return None
    excess = choice.statistics.selection_share() - choice.general.selection_share()
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(excess / np.hypot(error, general_error), posinf=np.inf, neginf=-np.inf)


def _remarks(choice: Choice) -> list[str]:
    remarks = []
    if choice.shortened:
        remarks.append(
            f"at most keeps below the threshold: layers {ranges(list(choice.shortened))}"
        )
    missing = set(choice.profile.provenance.moe_layers) - set(choice.layers)
    if missing:
        remarks.append(f"no expert chosen: layers {ranges(sorted(missing))}")
    if choice.ep > 1:
        per_rank = choice.profile.provenance.router.num_moe_experts // choice.ep
        counts = np.zeros((len(choice.layers), choice.ep), dtype=int)
        for i, ids in enumerate(choice.layers.values()):
            for expert in ids:
                counts[i, expert // per_rank] += 1
        spread = (counts.max(axis=1) - counts.min(axis=1)).max()
        totals = counts.sum(axis=0)
        remarks.append(
            f"EP {choice.ep}: the ranks' numbers of chosen experts differ by at most {spread} in "
            f"a layer; {totals.min()} to {totals.max()} on a rank in all"
        )
    return remarks


def _percent(share: float, errors: np.ndarray | None = None, at: tuple[int, int] = (0, 0)) -> str:
    if errors is None:
        return f"{100 * share:.1f} %"
    return f"{100 * share:.2f} ± {100 * errors[at]:.2f} %"


def _ratio(share: float, other: float) -> str:
    return f"{share / other:.2f}" if other > 0 else "inf"


def _without_empty(rows: list[list[str]]) -> list[str]:
    """The rows as a table without the columns that are empty below their title."""
    keep = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    last = len(keep) - 1 if rows[0][keep[-1]] == "experts" else len(keep)
    return table([[row[i] for i in keep] for row in rows], right=range(last))
