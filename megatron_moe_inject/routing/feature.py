"""Steering and the rows of routers as features."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.host.labels import GENERAL
from megatron_moe_inject.host.new_experts import card_of_run
from megatron_moe_inject.host.text import ranges
from megatron_moe_inject.host.uses import ROUTING_WATCH
from megatron_moe_inject.recipe.entries import split_labels
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.feature import Feature, RefusedBeside
from megatron_moe_inject.recipe.numbers import SHARES, check_bounds
from megatron_moe_inject.recipe.refused_options import Refusal
from megatron_moe_inject.recipe.schedule import Weight, ever_positive, show_weight
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.routing import uses
from megatron_moe_inject.routing.section import (
    STEERING,
    Steering,
    weighed_by_mean,
    weighed_by_token,
)
from megatron_moe_inject.teachers.align.rules import aligned_domains, aligned_names

if TYPE_CHECKING:
    from argparse import Namespace

    from megatron_moe_inject.host.contract import Contract
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart

_OWN_ASSIGNMENT = "assigns tokens by a rule of its own, against which steering cannot work"
_NO_STEERING = (
    Refusal("moe_router_load_balancing_type", _OWN_ASSIGNMENT, value="sinkhorn"),
    Refusal("moe_router_load_balancing_type", _OWN_ASSIGNMENT, value="quantile_balancing"),
    Refusal("moe_router_force_load_balancing", _OWN_ASSIGNMENT),
    Refusal("moe_router_force_biased", _OWN_ASSIGNMENT),
    Refusal("moe_enable_routing_replay", _OWN_ASSIGNMENT),
    Refusal("moe_router_fusion", "fuses balance losses that steering has to tell apart"),
    Refusal("cuda_graph_impl", "replays routers without the losses on them"),
)


def _refused(name: str, asked: Callable[[Steering], bool]) -> RefusedBeside:
    return RefusedBeside(
        _NO_STEERING,
        f"steering.{name}",
        lambda recipe, facts: asked(recipe[STEERING]),
        f"set steering.{name} to 0",
    )


class RouterRowsFeature(Feature):
    """``train.router_rows``: of each router, the rows of the experts that the domains chose."""

    def rules(self, recipe: Recipe) -> None:
        """Each domain names rows, and the routers do not train whole."""
        train = recipe.train
        if not train.router_rows:
            return
        if train.router:
            raise fail(
                "train.router_rows", True, "stands beside train.router, which trains all rows",
                "keep one of them",
            )  # fmt: skip
        for i, domain in enumerate(recipe.domains):
            if not domain.experts.layers and not domain.experts.undecided:
                raise fail(
                    "train.router_rows", True, f"has no rows to train for domain {domain.name!r}",
                    f"write domains[{i}].experts.layers, or train.router: true",
                )  # fmt: skip

    def uses(
        self, recipe: Recipe, facts: StudentFacts | None, args: Namespace | None
    ) -> list[Contract]:
        """Of routers with rows."""
        return [uses.ROUTER_ROWS] if recipe.train.router_rows else []

    def start(self, run: RunContext) -> RunPart | None:
        """Look for rows in the checkpoint."""
        if not run.recipe.train.router_rows:
            return None
        from megatron_moe_inject.routing.rows import RouterRows

        return RouterRows(run)


class SteeringFeature(Feature):
    """``steering``: domain tokens to their domain's experts, gently."""

    section = STEERING
    refuses = (
        _refused("coeff", lambda steering: steering.steers),
        _refused("retention", lambda steering: steering.retains),
    )

    def renumbered(self, recipe: Recipe, number_of: Callable[[str, int], int]) -> Recipe:
        """``steering.layers``."""
        steering = recipe[STEERING]
        if not steering.layers:
            return recipe
        layers = [number_of(f"steering.layers[{i}]", n) for i, n in enumerate(steering.layers)]
        sections = recipe.sections | {STEERING.key: replace(steering, layers=layers)}
        return replace(recipe, sections=sections)

    def rules(self, recipe: Recipe) -> None:
        """Shares are shares, layers have experts, and what is asked for has an effect."""
        steering = recipe[STEERING]
        if not 0 < steering.target_mass <= 1:
            raise fail(
                "steering.target_mass", steering.target_mass, "is not in (0, 1]",
                "write a share of a router's probability such as 0.5",
            )  # fmt: skip
        check_bounds("steering.target_mass", steering.target_mass, SHARES)
        if not 0 <= steering.bias_counts <= 1:
            raise fail(
                "steering.bias_counts", steering.bias_counts, "is not between 0 and 1",
                "0 counts general tokens only, 1 all alike",
            )  # fmt: skip
        check_bounds("steering.bias_counts", steering.bias_counts, SHARES, besides=(0,))
        if steering.stock_balance == "all" and steering.bias_counts:
            raise fail(
                "steering.bias_counts", steering.bias_counts, "has no use with stock_balance: all",
                "which counts all tokens alike: remove one of them",
            )  # fmt: skip
        if steering.detail_every < 0:
            raise fail("steering.detail_every", steering.detail_every, "is negative", "0 = never")
        for i, layer in enumerate(steering.layers):
            if layer < 0 or layer in steering.layers[:i]:
                problem = "is negative" if layer < 0 else "is named twice"
                raise fail(f"steering.layers[{i}]", layer, problem, "decoder layers count from 0")
        _check_use(recipe)

    def check(self, recipe: Recipe, facts: StudentFacts) -> None:
        """The student has routers, and general data where they are held on some."""
        steering = recipe[STEERING]
        if not steering.watches:
            return
        if facts.num_moe_experts is None:
            used = {
                "coeff": steering.steers,
                "retention": steering.retains,
                "report": steering.report,
            }
            name = next(name for name, value in used.items() if value)
            raise fail(
                f"steering.{name}", getattr(steering, name),
                "needs routers, but the student is dense", "set it to 0 or false",
            )  # fmt: skip
        if steering.retains and GENERAL not in split_labels(recipe, facts, "train"):
            raise fail(
                "steering.retention", steering.retention,
                "holds routers on general data, but every dataset belongs to a domain",
                "add general data to --data-path (5 to 10 %) or set it to 0",
            )  # fmt: skip

    def kept_originals(self, recipe: Recipe) -> Collection[str] | None:
        """The routers', to be held to them."""
        return ("router",) if recipe[STEERING].retains else ()

    def warnings(self, recipe: Recipe) -> list[str]:
        """A confidence that weighs all tokens alike."""
        if len(weighed_by_mean(recipe)) == 1 and not weighed_by_token(recipe):
            return [
                "steering.confidence: one domain is steered, and its teacher's window leaves all "
                "its tokens one weight, which changes nothing"
            ]
        return []

    def weights(self, recipe: Recipe) -> dict[str, Weight]:
        """The balance counts only beside the steering itself."""
        weights = super().weights(recipe)
        if not recipe[STEERING].steers:
            del weights["steering.balance"]
        return weights

    def plan_lines(self, recipe: Recipe, facts: StudentFacts | None) -> dict[str, list[str]]:
        """Its losses in words."""
        lines = _lines(recipe)
        return {"steering": lines} if lines else {}

    def uses(
        self, recipe: Recipe, facts: StudentFacts | None, args: Namespace | None
    ) -> list[Contract]:
        """What the log watches, and what steers."""
        steering = recipe[STEERING]
        watches = steering.watches or (args is not None and card_of_run(args) is not None)
        parts = [ROUTING_WATCH] if watches else []
        return [*parts, uses.STEERING] if steering.steers or steering.retains else parts

    def start(self, run: RunContext) -> RunPart | None:
        """Find targets, new experts, and what the checkpoint keeps of confidences."""
        if not (run.recipe[STEERING].watches or card_of_run(run.args)):
            return None
        from megatron_moe_inject.routing.part import SteeringPart

        return SteeringPart(run)


def _check_use(recipe: Recipe) -> None:
    steering, train = recipe[STEERING], recipe.train
    chosen = {layer for d in recipe.domains for layer in d.experts.layers}
    undecided = any(d.experts.undecided for d in recipe.domains)
    if steering.retains and not (train.routers or train.router_rows):
        raise fail(
            "steering.retention", steering.retention, "holds routers that do not train",
            "set train.router: true or remove it",
        )  # fmt: skip
    if steering.steers and steering.confidence != "none":
        _check_confidence(recipe)
    if undecided:
        return
    name = "coeff" if steering.steers else "report"
    if (steering.steers or steering.report) and not chosen:
        raise fail(
            f"steering.{name}", getattr(steering, name), "but no domain chose experts",
            "write domains[0].experts, or remove it",
        )  # fmt: skip
    for i, layer in enumerate(steering.layers):
        if layer not in chosen:
            raise fail(
                f"steering.layers[{i}]", layer, "has no experts that a domain chose",
                f"the layers that have are {sorted(chosen)}",
            )  # fmt: skip


def _check_confidence(recipe: Recipe) -> None:
    kind = recipe[STEERING].confidence
    for i, domain in enumerate(recipe.domains):
        if domain.teacher is None and (domain.experts.layers or domain.experts.undecided):
            raise fail(
                "steering.confidence", kind, f"asks for a teacher that {domain.name!r} lacks",
                f"write domains[{i}].teacher, or confidence: none",
            )  # fmt: skip
    if kind == "top" and aligned_domains(recipe):
        name = aligned_names(recipe)[0]
        raise fail(
            "steering.confidence", kind,
            f"asks for a teacher's most likely token, and teacher {name} (align: chunks) tells how "
            "likely it finds the text", "write label, or none",
        )  # fmt: skip


def _lines(recipe: Recipe) -> list[str]:
    steering, lines = recipe[STEERING], []
    if steering.steers:
        chosen = {la for d in recipe.domains for la in d.experts.layers}
        layers = sorted(chosen & set(steering.layers)) if steering.layers else sorted(chosen)
        where = f"layers {ranges(layers)}"
        if any(domain.experts.undecided for domain in recipe.domains):
            where = f"layers {ranges(steering.layers)}" if steering.layers else "all their layers"
        coeff, mass = show_weight(steering.coeff), f"{steering.target_mass:g}"
        lines.append(f"{coeff} * relu(log {mass} - log mass) on a domain's experts, {where}")
        for names, how in (
            (weighed_by_token(recipe), "of each token"),
            (weighed_by_mean(recipe), "its mean over earlier steps, as the teacher has a window"),
        ):
            if names:
                weight = f"weighted by the teacher's confidence[{steering.confidence}]"
                lines.append(f"{' and '.join(names)}: {weight}, {how}")
        if ever_positive(steering.balance):
            lines.append(f"{show_weight(steering.balance)} * balance within each domain's experts")
        if steering.stock_balance == "general":
            lines.append("Megatron's balance losses see general tokens only")
    if steering.retains:
        lines.append(f"{show_weight(steering.retention)} * KL(original router || router)")
    return lines
