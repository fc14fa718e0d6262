"""``moe-inject select`` and ``moe-inject merge-profiles``.

``select`` applies the recipe's own options of ``domains[].experts`` to a profile, by the same
rules, and shows what comes out. Files that it is asked to write are replaced whole or not at all.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_moe_inject.experts.choose import select_report
from megatron_moe_inject.experts.choose.choice import choose_experts, shortened
from megatron_moe_inject.experts.choose.profile_file import (
    merge_profiles,
    profile_checksum,
    read_profile,
    write_profile,
)
from megatron_moe_inject.experts.choose.routing_profile import GENERAL_CLASS, RoutingProfile
from megatron_moe_inject.host.commands import Commands, add_command
from megatron_moe_inject.host.errors import (
    RecipeError,
    listing,
    show,
)
from megatron_moe_inject.host.files import replace_file
from megatron_moe_inject.host.text import (
    count,
    table,
)
from megatron_moe_inject.recipe.expert_choice import (
    BUDGETS,
    METHODS,
    SCORES,
    ExpertChoice,
    describe_choice,
)
from megatron_moe_inject.recipe.layer_list import parse_layers
from megatron_moe_inject.recipe.rules import check_profile_choice

_OPTIONS = (
    *("domain", "method", "threshold", "n", "budget", "budget_of", "score"),
    *("at_least", "at_most", "ep"),
)
_EXAMPLES = """examples:
  moe-inject select code.json --method token --threshold 0.2
  moe-inject select all.json --domain code --method contrast --threshold 0.5 --at-most 8 --ep 8
  moe-inject select all.json --domain code --method budget --budget 0.05 --heat-map code.png
"""


def add_commands(commands: Commands) -> None:
    """Add both commands to ``moe-inject``; ``run`` of the parsed options returns the text."""
    select = add_command(
        commands,
        "select",
        "choose experts from a routing profile",
        "Choose a domain's experts from a routing profile: a table, a fragment for "
        "a recipe and, if asked for, a heat map.",
        _EXAMPLES,
        run=_select,
    )
    select.add_argument("profile", metavar="PROFILE", help="a routing profile (JSON)")
    select.add_argument("--domain", metavar="NAME", help="class of the profile (default: the one)")
    select.add_argument("--method", help=f"how to choose: {', '.join(METHODS)}")
    for flag, kind, metavar, text in (
        ("threshold", float, "SHARE", f"{', '.join(SCORES)}: share of a layer's score to reach"),
        ("n", int, "N", "top_n: experts per layer"),
        ("budget", float, "SHARE", "budget: share of the parameters to spend"),
        ("budget-of", str, "WHAT", f"budget: {' or '.join(BUDGETS)} parameters (default routed)"),
        ("score", str, "SCORE", f"top_n, budget: {', '.join(SCORES)} (default token)"),
        ("at-least", int, "N", "experts per layer, at least"),
        ("at-most", int, "N", "experts per layer, at most"),
        ("layers", str, "RANGES", "only these 0-based decoder layers, as in 12-23,26"),
        ("ep", int, "SIZE", "spread each layer's experts over this many expert-parallel ranks"),
        ("output", str, "FILE", "write the recipe fragment here instead of printing it"),
        ("heat-map", str, "FILE", "write a heat map (PNG); needs matplotlib"),
    ):
        select.add_argument(f"--{flag}", type=kind, metavar=metavar, help=text)
    select.add_argument("--per-expert", action="store_true", help="a line for each chosen expert")

    merge = add_command(
        commands,
        "merge-profiles",
        "add up routing profiles of one student",
        "Add up routing profiles of one student, recorded alike. Classes in several "
        "files are summed; no recording may be counted twice.",
        run=_merge,
    )
    merge.add_argument("profiles", metavar="PROFILE", nargs="+", help="routing profiles (JSON)")
    merge.add_argument("--output", metavar="FILE", required=True, help="the sum")


def _select(options: argparse.Namespace) -> str:
    expert_choice = ExpertChoice(
        profile=options.profile,
        only_layers=[] if options.layers is None else parse_layers(options.layers),
        **{name: getattr(options, name) for name in _OPTIONS},
    )
    _refuse_overwriting(options)
    try:
        check_profile_choice("", expert_choice)
        profile = read_profile(options.profile)
        domain = options.domain or _only_domain(profile)
        layers = choose_experts(expert_choice, profile, domain)
        cut = shortened(expert_choice, profile, domain)
    except RecipeError as error:
        raise _as_flag(error) from None
    origin = describe_choice(expert_choice, domain, profile_checksum(profile))
    choice = select_report.Choice(profile, domain, layers, origin, expert_choice.ep or 1, cut)
    sections = [select_report.summary(choice), select_report.layer_table(choice)]
    if profile.provenance.new_experts is not None:
        sections.append(select_report.new_table(choice))
    if options.per_expert:
        sections.append(select_report.expert_table(choice))
    fragment = select_report.fragment(choice)
    if options.heat_map is not None:
        replace_file(options.heat_map, select_report.picture(choice))
        sections.append([f"heat map: {options.heat_map}"])
    if options.output is None:
        sections.append(fragment.splitlines())
    else:
        replace_file(options.output, fragment.encode())
        sections.append([f"recipe fragment: {options.output}"])
    return "\n\n".join("\n".join(lines) for lines in sections)


def _merge(options: argparse.Namespace) -> str:
    paths = options.profiles
    if len(set(paths)) != len(paths) or len(paths) < 2:
        raise RecipeError(
            f"merge-profiles: {listing(paths)}; name two or more different files to add up"
        )
    merged = merge_profiles({path: read_profile(path) for path in paths})
    checksum = write_profile(options.output, merged)
    rows = [("class", "tokens", "sequences", "data")]
    for name, statistics in merged.classes.items():
        sequences = "" if statistics.spread is None else str(statistics.spread.sequences)
        rows.append(
            (
                name,
                count(int(statistics.tokens.max())),
                sequences,
                listing(statistics.data, limit=4),
            )
        )
    lines = table(rows, right=(1, 2))
    return "\n".join([*lines, "", f"{options.output} (sha256 {checksum[:12]})"])


def _only_domain(profile: RoutingProfile) -> str:
    names = [name for name in profile.classes if name != GENERAL_CLASS]
    if len(names) != 1:
        raise RecipeError(f"domain: missing; choose one of {listing(names) or '(none)'}", "domain")
    return names[0]


def _as_flag(error: RecipeError) -> RecipeError:
    """The same error in terms of a flag, where its key is one."""
    key = error.key or ""
    flag = key.split("[")[0].replace("_", "-").replace("only-", "")
    if not key or not str(error).startswith(key) or "." in key or key == "profile":
        return error
    return RecipeError(f"--{flag}{str(error).removeprefix(key)}", error.key)


def _refuse_overwriting(options: argparse.Namespace) -> None:
    taken = {os.path.realpath(options.profile): "the profile"}
    for flag, path in (("--output", options.output), ("--heat-map", options.heat_map)):
        if path is None:
            continue
        real = os.path.realpath(path)
        if real in taken:
            raise RecipeError(f"{flag}: {show(path)} is {taken[real]}; name another file")
        taken[real] = f"the file of {flag}"
        if not Path(real).parent.is_dir():
            raise RecipeError(f"{flag}: {show(path)} is in no folder that exists; make it first")
