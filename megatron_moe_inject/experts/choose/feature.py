"""Recording a routing profile as a feature, beside training or alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_moe_inject.host.uses import ROUTING_WATCH
from megatron_moe_inject.recipe import run_kinds
from megatron_moe_inject.recipe.feature import Feature

if TYPE_CHECKING:
    from argparse import Namespace

    from megatron_moe_inject.host.contract import Contract
    from megatron_moe_inject.recipe.facts import StudentFacts
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart
    from megatron_moe_inject.recipe.schema import Recipe


class ProfileFeature(Feature):
    """``--inject-profile``: how each class of data is routed."""

    runs = (run_kinds.INJECTION, run_kinds.PROFILE)

    def uses(
        self, recipe: Recipe, facts: StudentFacts | None, args: Namespace | None
    ) -> list[Contract]:
        """Watching routers."""
        profiles = args is not None and args.inject_profile is not None
        return [ROUTING_WATCH] if profiles else []

    def start(self, run: RunContext) -> RunPart | None:
        """Look for room in memory and on disk."""
        if run.args.inject_profile is None:
            return None
        from megatron_moe_inject.experts.choose.part import ProfilePart

        return ProfilePart(run)
