"""The part of a recipe that chooses a domain's experts, and its compact form."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

from megatron_moe_inject.host.errors import (
    fail,
    show,
)
from megatron_moe_inject.host.text import ranges

SCORES = ("token", "gate", "contrast")
METHODS = (*SCORES, "top_n", "budget")
BUDGETS = ("routed", "all")
NUMBERINGS = ("new", "old")


@dataclass
class ExpertChoice:
    """Chosen experts: named by ``layers``, chosen from a routing profile, or new ones.

    With ``profile`` or ``new`` the experts are chosen when the recipe meets its student
    (``experts.choose.choice.resolve_experts``), which leaves ``layers`` and ``origin``.

    Attributes:
        layers: 0-based global decoder layer -> global expert ids. YAML also takes the flag's
            compact form, quoted: ``layers: "12:3,40;13:1"``.
        origin: how ``layers`` were chosen, for plans and reports.
        profile: a routing profile; a relative path starts at the working directory, as the
            teachers' and the data's do.
        domain: class of the profile; None = the domain's name.
        method: ``token``, ``gate`` or ``contrast`` (that score until ``threshold``), ``top_n``
            (``n`` experts of every layer) or ``budget`` (over all layers, by ``score``).
        threshold: share of a layer's score that the chosen experts reach.
        n: experts per layer.
        budget: share of the parameters that the chosen experts may have.
        budget_of: ``routed`` (all routed experts, the default) or ``all`` (the whole model).
        score: what ``top_n`` and ``budget`` rank by: ``token`` (the default), ``gate``,
            ``contrast``.
        at_least, at_most: experts per layer.
        only_layers: decoder layers to choose in; empty = all MoE layers.
        new: experts that ``moe-inject add-experts`` gave the student's checkpoint: ``all``, or
            those for a domain that was named there.
        numbering: whose ids ``layers`` has, the checkpoint's (``new``, the default) or, before
            experts were added to it, its base's (``old``).
        ep: expert-parallel ranks to spread each layer's experts over. Named here rather than
            read from the run, so that the choice does not depend on the layout.
    """

    EXAMPLE: ClassVar = '{layers: {3: [0, 5]}}, or "3:0,5"'

    layers: dict[int, list[int]] = field(default_factory=dict)
    origin: str | None = None
    profile: str | None = None
    domain: str | None = None
    method: str | None = field(default=None, metadata={"choices": METHODS, "offers_null": False})
    threshold: float | None = None
    n: int | None = None
    budget: float | None = None
    budget_of: str | None = field(default=None, metadata={"choices": BUDGETS})
    score: str | None = field(default=None, metadata={"choices": SCORES})
    at_least: int | None = None
    at_most: int | None = None
    only_layers: list[int] = field(default_factory=list)
    ep: int | None = None
    new: str | None = None
    numbering: str | None = field(default=None, metadata={"choices": NUMBERINGS})

    @property
    def undecided(self) -> bool:
        """Whether the experts are still to be chosen, once profile or checkpoint is read."""
        return self.profile is not None or self.new is not None


def parse_experts(text: str, key: str = "experts") -> dict[int, list[int]]:
    """Expert ids by layer from the compact form ``"12:3,40;13:1"`` (layer:ids;layer:ids).

    Raises:
        RecipeError: a part that is not ``layer:id,id``, or a layer that appears twice.
    """
    layers: dict[int, list[int]] = {}
    for part in text.split(";"):
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*:\s*([0-9,\s]+)", part)
        ids = match[2].split(",") if match else []
        if not match or not all(re.fullmatch(r"\s*[0-9]{1,9}\s*", i) for i in ids):
            raise fail(
                key, text, f"has the part {show(part)}", "write layer:id,id;layer:id as in 12:3,40"
            )
        layer = int(match[1])
        if layer in layers:
            raise fail(key, text, f"names layer {layer} twice", "join its ids with commas")
        layers[layer] = [int(i) for i in ids]
    return layers


def describe_new(which: str) -> str:
    """How new experts were chosen, on one line."""
    return "the checkpoint's new experts" + ("" if which == "all" else f" for {which}")


_SCORE_NAMES = {"token": "token share", "gate": "gate share", "contrast": "contrast with general"}


def describe_choice(choice: ExpertChoice, domain: str, checksum: str | None) -> str:
    """How experts were chosen, on one line; without a checksum, how they will be."""
    if choice.new is not None:
        return describe_new(choice.new)
    method = choice.method
    score = _SCORE_NAMES[method if method in _SCORE_NAMES else choice.score or "token"]
    rules: dict[str | None, str] = {
        "top_n": f"{choice.n} per layer",
        "budget": f"{choice.budget} of",
    }
    rule = rules.get(method, f"until {choice.threshold}")
    joint = " " if method in _SCORE_NAMES else ", "
    if method == "budget":
        rule += " all parameters" if choice.budget_of == "all" else " the routed parameters"
    limits = [
        f"{name.replace('_', ' ')} {value}"
        for name in ("at_least", "at_most", "ep")
        if (value := getattr(choice, name)) is not None
    ]
    if choice.only_layers:
        limits.append(f"layers {ranges(choice.only_layers)}")
    parts = [score + joint + rule, *limits, f"class {domain} of {choice.profile}"]
    known = "not there yet" if checksum is None else f"sha256 {checksum[:12]}"
    return f"{', '.join(parts)} ({known})"
