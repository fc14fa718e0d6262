"""``moe-inject routing-report``: what training did to the student's routing.

Compares two routing profiles of one student, before and after: where each class of data goes, how
far it moved, and what became of the target experts, as a table and as heat maps.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_moe_inject.experts.choose.choice import resolve_experts
from megatron_moe_inject.experts.choose.profile_file import read_profile
from megatron_moe_inject.experts.choose.profile_numbers import in_numbers_of
from megatron_moe_inject.experts.choose.routing_profile import (
    GENERAL_CLASS,
    ClassStatistics,
    RoutingProfile,
)
from megatron_moe_inject.host.commands import Commands, add_command
from megatron_moe_inject.host.errors import (
    RecipeError,
    listing,
    show,
)
from megatron_moe_inject.host.files import replace_file
from megatron_moe_inject.host.heat_map import Panel, heat_map
from megatron_moe_inject.host.text import (
    table,
)
from megatron_moe_inject.recipe.expert_choice import parse_experts
from megatron_moe_inject.recipe.load import load_recipe

_EXAMPLES = """examples:
  moe-inject routing-report before.json after.json --recipe recipe.yaml --heat-map moved.png
  moe-inject routing-report before.json after.json --experts "2:0,3;3:3"
"""


def add_commands(commands: Commands) -> None:
    """Add the command to ``moe-inject``; ``run`` of the parsed options returns the text."""
    report = add_command(
        commands,
        "routing-report",
        "compare the student's routing before and after training",
        "Compare two routing profiles of one student: a table by class of data and "
        "layer and, if asked for, heat maps.",
        _EXAMPLES,
        run=_report,
    )
    report.add_argument("before", metavar="BEFORE", help="a routing profile (JSON)")
    report.add_argument("after", metavar="AFTER", help="another, of the same student later")
    report.add_argument("--domain", metavar="NAME", help="class of the profiles (default: the one)")
    targets = report.add_mutually_exclusive_group()
    targets.add_argument("--recipe", metavar="RECIPE", help="its experts for the domain are marked")
    targets.add_argument("--experts", metavar="LAYERS", help="mark these, as in 12:3,40;13:1")
    report.add_argument("--heat-map", metavar="FILE", help="heat maps (PNG); needs matplotlib")


def _report(options: argparse.Namespace) -> str:
    before, after = (read_profile(path) for path in (options.before, options.after))
    after = in_numbers_of(after, before.provenance.pattern, "AFTER", options.after)
    check_same_student(before, after, (options.before, options.after))
    domain = options.domain or _shared_domain(before, after)
    for profile in (before, after):
        profile.of(domain, "--domain")
    targets = _targets(options, domain, before)
    sections = [_remark(domain, (before, after)), layer_table(before, after, domain, targets)]
    if options.heat_map is not None:
        _refuse_overwriting(options)
        replace_file(options.heat_map, picture(before, after, domain, targets))
        sections.append([f"heat map: {options.heat_map}"])
    return "\n\n".join("\n".join(lines) for lines in sections)


def layer_table(
    before: RoutingProfile,
    after: RoutingProfile,
    domain: str,
    targets: Mapping[int, Sequence[int]],
) -> list[str]:
    """One line per layer, and what the columns are."""
    layers, new = before.provenance.moe_layers, after.provenance.new_experts or {}
    general = all(GENERAL_CLASS in profile.classes for profile in (before, after))
    names = [domain, *([GENERAL_CLASS] if general else [])]
    columns = [*_columns(targets), *(["on new"] if new else [])]
    header = ["layer", *(f"{name} {what}" for name in names for what in columns)]
    rows = [[*header, "unused"]]
    for row, layer in enumerate(layers):
        cells = [str(layer)]
        for name in names:
            pair = before.classes[name], after.classes[name]
            shares = [statistics.selection_share()[row] for statistics in pair]
            if targets:
                ids = list(targets.get(layer, ()))
                on = [f"{100 * share[ids].sum():.1f}" if ids else "" for share in shares]
                cells += [" > ".join(on) if ids else ""]
            cells.append(f"{100 * np.abs(shares[1] - shares[0]).sum() / 2:.1f}")
            if new:
                ids = new.get(layer, [])
                cells.append(" > ".join(f"{100 * share[ids].sum():.1f}" for share in shares))
        cells.append(" > ".join(str(_unused(profile, row)) for profile in (before, after)))
        rows.append(cells)
    notes = ["moved: share of the class's routing choices that went to other experts, %"]
    if targets:
        notes.insert(0, "on targets: share of the class's choices on the marked experts, %")
    if new:
        notes.append("on new: share of the class's choices on new experts, %")
    notes.append("unused: experts that no token of any class chose")
    return [*table(rows, right=range(len(rows[0]))), "", *notes]


def picture(
    before: RoutingProfile,
    after: RoutingProfile,
    domain: str,
    targets: Mapping[int, Sequence[int]],
) -> bytes:
    """PNG: the domain's choices before, after, and the differences of both classes.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    experts = before.provenance.router.num_moe_experts
    unit = "in units of an even share"

    def share(found: ClassStatistics) -> np.ndarray:
        return found.selection_share() * experts

    shares = [share(profile.classes[domain]) for profile in (before, after)]
    panels = [
        Panel(f"{domain} before, {unit}", shares[0]),
        Panel(f"{domain} after, {unit}", shares[1]),
        Panel(f"{domain}: after minus before", shares[1] - shares[0], signed=True),
    ]
    if all(GENERAL_CLASS in profile.classes for profile in (before, after)):
        pair = [share(profile.classes[GENERAL_CLASS]) for profile in (before, after)]
        panels.append(Panel("general: after minus before", pair[1] - pair[0], signed=True))
    title = f"routing of {domain}" + (" (target experts marked)" if targets else "")
    return heat_map(panels, before.provenance.moe_layers, targets, title)


def _columns(targets: Mapping[int, Sequence[int]]) -> list[str]:
    return ["on targets", "moved"] if targets else ["moved"]


def _unused(profile: RoutingProfile, row: int) -> int:
    counts = sum(statistics.selections[row] for statistics in profile.classes.values())
    return int((counts == 0).sum())


def _remark(domain: str, profiles: Sequence[RoutingProfile]) -> list[str]:
    places = [profile.provenance for profile in profiles]
    return [
        f"routing of {domain}, {'before':6s}: {places[0].checkpoint or 'a random start'}, "
        f"iterations {places[0].first_iteration} to {places[0].last_iteration}",
        f"routing of {domain}, {'after':6s}: {places[1].checkpoint or 'a random start'}, "
        f"iterations {places[1].first_iteration} to {places[1].last_iteration}",
    ]


def _targets(
    options: argparse.Namespace, domain: str, profile: RoutingProfile
) -> Mapping[int, Sequence[int]]:
    if options.experts is not None:
        targets = parse_experts(options.experts, "--experts")
    elif options.recipe is not None:
        recipe = resolve_experts(load_recipe(options.recipe), like=profile)
        matches = [candidate for candidate in recipe.domains if candidate.name == domain]
        if not matches:
            names = listing(candidate.name for candidate in recipe.domains)
            raise RecipeError(
                f"--recipe: {options.recipe} has no domain {domain!r}; it has {names}"
            )
        targets = matches[0].experts.layers
    else:
        return {}
    known = profile.provenance
    for layer, ids in targets.items():
        if layer not in known.moe_layers:
            raise RecipeError(f"--experts: layer {layer} is no MoE layer of the profiles")
        for expert in ids:
            if expert >= known.router.num_moe_experts:
                raise RecipeError(
                    f"--experts: layer {layer} has no expert {expert}; they are 0 to "
                    f"{known.router.num_moe_experts - 1}"
                )
    return targets


def check_same_student(
    before: RoutingProfile, after: RoutingProfile, files: tuple[str, str]
) -> None:
    """Refuse profiles of different students.

    Raises:
        RecipeError: names what differs.
    """
    pair = before.provenance, after.provenance
    for name in ("moe_layers", "num_layers", "router", "parameters"):
        values = [getattr(provenance, name) for provenance in pair]
        if values[0] != values[1]:
            raise RecipeError(
                f"{files[1]}: {name} is {show(values[1])}, in {files[0]} "
                f"{show(values[0])}; compare profiles of one student"
            )


def _shared_domain(before: RoutingProfile, after: RoutingProfile) -> str:
    names = [n for n in before.classes if n in after.classes and n != GENERAL_CLASS]
    if len(names) != 1:
        raise RecipeError(f"--domain: missing; choose one of {listing(names) or '(none)'}")
    return names[0]


def _refuse_overwriting(options: argparse.Namespace) -> None:
    real = os.path.realpath(options.heat_map)
    for path in (options.before, options.after):
        if os.path.realpath(path) == real:
            raise RecipeError(f"--heat-map: {show(path)} is a profile; name another file")
    if not Path(real).parent.is_dir():
        raise RecipeError(
            f"--heat-map: {show(options.heat_map)} is in no folder that exists; make it first"
        )
