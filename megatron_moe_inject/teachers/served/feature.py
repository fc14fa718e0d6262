"""Servers as a feature: the rules for them, and what asks them."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.feature import Feature
from megatron_moe_inject.recipe.run_kinds import EVALUATION, INJECTION
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.teachers.served.rules import (
    check_server,
    check_temperature,
    served_names,
)
from megatron_moe_inject.teachers.uses import SERVED

if TYPE_CHECKING:
    from megatron_moe_inject.host.contract import Contract
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart


class ServersFeature(Feature):
    """``source: server:URL``: a teacher that is asked over HTTP."""

    runs = (INJECTION, EVALUATION)

    def rules(self, recipe: Recipe) -> None:
        """Nothing that servers cannot be asked."""
        for name in served_names(recipe):
            check_server(recipe, name)

    def foresee(self, recipe: Recipe, facts: StudentFacts, args: Namespace) -> list[str]:
        """What a step will ask for. The servers themselves are asked when a run begins."""
        if not served_names(recipe):
            return []
        from megatron_moe_inject.teachers.served.part import (
            check_reading,
            in_the_clear,
            work_of_step,
        )

        check_reading(recipe, args)
        remarks = []
        for name in served_names(recipe):
            check_temperature(recipe, name, getattr(args, "vocab_size", None))
            remarks.append(work_of_step(recipe, name, args))
            remarks += in_the_clear(recipe, name)
        return remarks

    def uses(
        self, recipe: Recipe, facts: StudentFacts | None, args: Namespace | None
    ) -> list[Contract]:
        """The order in which Megatron reads its data."""
        return [SERVED] if served_names(recipe) else []

    def start(self, run: RunContext) -> RunPart | None:
        """Be ready to ask."""
        if not served_names(run.recipe):
            return None
        from megatron_moe_inject.teachers.served.part import ServedPart

        return ServedPart(run)
