"""Which old experts new ones are copied from: a domain's most used, or those that are named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_moe_inject.experts.choose.choice import contrast_scores
from megatron_moe_inject.experts.choose.profile_file import read_profile
from megatron_moe_inject.experts.choose.profile_numbers import in_numbers_of
from megatron_moe_inject.experts.choose.routing_profile import RoutingProfile
from megatron_moe_inject.experts.grow.numbering import Numbering
from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.host.layer_pattern import LayerPattern
from megatron_moe_inject.recipe.expert_choice import SCORES, parse_experts

_PROFILE, _DONORS = "--profile", "--donors"


class Shape(NamedTuple):
    """What a profile must be of.

    Attributes:
        experts: of a layer.
        topk: chosen for a token.
        layers: decoder layers with experts.
        pattern: of a hybrid model.
    """

    experts: int
    topk: int
    layers: Sequence[int]
    pattern: LayerPattern | None


def profile_of(path: str, shape: Shape) -> RoutingProfile:
    """A profile of the checkpoint's model, in its layer numbers.

    Raises:
        RecipeError: it cannot be read, or is of another model.
    """
    profile = in_numbers_of(read_profile(path), shape.pattern, _PROFILE, path)
    provenance = profile.provenance
    theirs = provenance.router.num_moe_experts, provenance.router.topk, provenance.moe_layers
    ours = shape.experts, shape.topk, list(shape.layers)
    if theirs != ours:
        raise fail(
            _PROFILE, path,
            f"is of a student with {theirs[0]} experts, {theirs[1]} chosen, in layers {theirs[2]}, "
            f"and the checkpoint has {ours[0]}, {ours[1]} and {ours[2]}",
            "record a profile of the checkpoint (moe-inject profile)",
        )  # fmt: skip
    return profile


def most_used(
    profile: RoutingProfile, domains: Sequence[str], score: str, numbering: Numbering
) -> dict[int, list[int]]:
    """By layer a donor for each new expert: the domains' most used experts of its group, in turns.

    Args:
        score: a word of ``SCORES``.

    Raises:
        RecipeError: the profile has no such class, or nothing to contrast with.
    """
    if score not in SCORES:
        raise fail("--score", score, "is no score", f"use {', '.join(SCORES)}")
    ranked = {domain: _ranked(profile, domain, score) for domain in domains}
    per_group = len(numbering.new) // numbering.groups
    donors: dict[int, list[int]] = {}
    for row, layer in enumerate(profile.provenance.moe_layers):
        donors[layer] = []
        for number in range(len(numbering.new)):
            turn = number % per_group
            domain, rank = domains[turn % len(domains)], turn // len(domains)
            group = numbering.old_ids(numbering.group_of_new(number))
            order = [int(e) for e in ranked[domain][row] if e in group]
            donors[layer].append(order[rank % len(order)])
    return donors


def _ranked(profile: RoutingProfile, domain: str, score: str) -> np.ndarray:
    """``[L, E]`` ids of each layer, the highest score first."""
    statistics = profile.of(domain, "--domain")
    if score == "contrast":
        scores = contrast_scores(profile, statistics)
    else:
        scores = statistics.selection_share() if score == "token" else statistics.gate_share()
    return np.argsort(-scores, axis=1, kind="stable")


def named_donors(text: str, layers: Sequence[int], numbering: Numbering) -> dict[int, list[int]]:
    """``1,3`` for every layer, or ``0:1,3;1:2,5`` for each, in the order of the new ids.

    Raises:
        RecipeError: not that, or not one for each new expert of each layer.
    """
    if re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        ids = [int(part) for part in text.split(",")]
        donors = dict.fromkeys(layers, ids)
    else:
        donors = parse_experts(text, _DONORS)
    count, experts = len(numbering.new), len(numbering.moved)
    for layer in layers:
        if layer not in donors:
            raise fail(_DONORS, text, f"names none for layer {layer}", "name them for each layer")
        ids = donors[layer]
        if len(ids) != count or any(e >= experts for e in ids):
            raise fail(
                _DONORS, text, f"is not one for each of {count} new experts of layer {layer}",
                f"name {count} of 0 to {experts - 1}, in the order of the new ids",
            )  # fmt: skip
    return {layer: donors[layer] for layer in layers}


def for_domains(domains: Sequence[str], numbering: Numbering) -> dict[str, list[int]]:
    """By domain the ids that are for it: each group's new experts are shared out in turns."""
    per_group = len(numbering.new) // numbering.groups
    shared: dict[str, list[int]] = {domain: [] for domain in domains}
    for number, expert in enumerate(numbering.new):
        if domains:
            shared[domains[number % per_group % len(domains)]].append(expert)
    return shared


def first_of_groups(numbering: Numbering) -> list[int]:
    """A donor for each new expert where it does not matter: old ones of its group, from the
    first."""
    per_group = len(numbering.new) // numbering.groups
    return [
        numbering.old_ids(numbering.group_of_new(n))[n % per_group % len(numbering.old_ids(0))]
        for n in range(len(numbering.new))
    ]


def check_recorded(
    path: str, profile: RoutingProfile, checkpoint: Path, checksum: str
) -> str | None:
    """What to say of a profile that is not known to be of this very checkpoint; ``None`` if it
    is."""
    recorded = profile.provenance.checkpoint_sha256
    if recorded == checksum:
        return None
    known = recorded or "an unknown checkpoint"
    return (
        f"the profile {path} was recorded of other weights ({known[:12]}) than {checkpoint} has "
        f"({checksum[:12]}): its most used experts may not be these"
    )
