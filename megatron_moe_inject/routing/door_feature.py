"""``routing.open`` as a feature: new experts open gradually."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.feature import Feature, RefusedBeside
from megatron_moe_inject.recipe.refused_options import Refusal
from megatron_moe_inject.recipe.run_kinds import EVALUATION, GENERATION, INJECTION, PROFILE
from megatron_moe_inject.recipe.schedule import Schedule, Weight, highest, show_weight
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.routing import uses
from megatron_moe_inject.routing.section import ROUTING

if TYPE_CHECKING:
    from megatron_moe_inject.host.contract import Contract
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart

_OWN_ASSIGNMENT = "assigns tokens by a rule of its own, whatever an expert's probability is"
_NO_DOOR = (
    Refusal("moe_router_load_balancing_type", _OWN_ASSIGNMENT, value="sinkhorn"),
    Refusal("moe_router_load_balancing_type", _OWN_ASSIGNMENT, value="quantile_balancing"),
    Refusal("moe_router_force_load_balancing", _OWN_ASSIGNMENT),
    Refusal("moe_router_force_biased", _OWN_ASSIGNMENT),
    Refusal("moe_enable_routing_replay", _OWN_ASSIGNMENT),
    Refusal("moe_expert_capacity_factor", "drops choices, which are counted without the door"),
    Refusal("cuda_graph_impl", "replays routers as they were when it was captured"),
)


class DoorFeature(Feature):
    """``routing.open``; also what measures a checkpoint that was saved while it opened."""

    section = ROUTING
    runs = (INJECTION, EVALUATION, PROFILE, GENERATION)
    refuses = (
        RefusedBeside(
            _NO_DOOR,
            "routing.open",
            lambda recipe, facts: recipe[ROUTING].open is not None,
            "remove routing.open",
        ),
    )

    def rules(self, recipe: Recipe) -> None:
        """It ends open, and never lies outside of [0, 1]."""
        opened = recipe[ROUTING].open
        if opened is None:
            return
        if highest(opened) > 1:
            raise fail("routing.open", highest(opened), "is above 1", "1 is open")
        last = opened.points[max(opened.points)] if isinstance(opened, Schedule) else opened
        if last != 1:
            raise fail(
                "routing.open", show_weight(opened),
                f"ends at {last:g}, so that no checkpoint would be what it was trained as",
                "write points that end at 1, as in {points: {0: 0.0, 100: 1.0}}",
            )  # fmt: skip

    def weights(self, recipe: Recipe) -> dict[str, Weight]:
        """None: it weighs no loss."""
        return {}

    def plan_lines(self, recipe: Recipe, facts: StudentFacts | None) -> dict[str, list[str]]:
        """By when they are open."""
        opened = recipe[ROUTING].open
        if opened is None:
            return {}
        line = f"open to {show_weight(opened)} of their unnormalised probability (routing.open)"
        return {"new experts": [line]}

    def uses(
        self, recipe: Recipe, facts: StudentFacts | None, args: Namespace | None
    ) -> list[Contract]:
        """Of routers with a door; a stored one is only known once a run starts."""
        return [uses.DOOR] if recipe[ROUTING].open is not None else []

    def foresee(self, recipe: Recipe, facts: StudentFacts, args: Namespace) -> list[str]:
        """Whether something stands behind it, and whether it opens in time; without it, whether a
        token will reach new experts."""
        from megatron_moe_inject.routing.door_part import late, planned_door, unreached

        opened = recipe[ROUTING].open
        if any(domain.experts.undecided for domain in recipe.domains):
            return []
        if opened is None:
            return unreached(recipe, args)
        planned_door(recipe, args)
        return late(opened, args)

    def start(self, run: RunContext) -> RunPart | None:
        """The door of the run."""
        from megatron_moe_inject.routing.door_part import door_part

        return door_part(run)
