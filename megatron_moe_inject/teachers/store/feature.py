"""Stores as a feature: the rules for them, their trust, and where tokens of the data stand."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from megatron_moe_inject.data.uses import PLACES
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.feature import Feature
from megatron_moe_inject.recipe.run_kinds import EVALUATION, INJECTION
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.teachers.store.rules import check_rules, stored_names

if TYPE_CHECKING:
    from megatron_moe_inject.host.contract import Contract
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart


class StoresFeature(Feature):
    """``source: store:/dir``: what a teacher said before, in the teacher's place."""

    runs = (INJECTION, EVALUATION)

    def rules(self, recipe: Recipe) -> None:
        """Nothing that needs more of a teacher than a store has."""
        for name in stored_names(recipe):
            check_rules(recipe, name)

    def foresee(self, recipe: Recipe, facts: StudentFacts, args: Namespace) -> list[str]:
        """Stores that lack a temperature, the data, or a signature; who signed the others."""
        if not stored_names(recipe):
            return []
        from megatron_moe_inject.teachers.store.part import (
            checked_stores,
            data_in_store,
            told_of,
        )

        manifests = checked_stores(recipe)
        data_in_store(recipe, facts, manifests)
        return [told_of(name, recipe, manifest, args) for name, manifest in manifests.items()]

    def uses(
        self, recipe: Recipe, facts: StudentFacts | None, args: Namespace | None
    ) -> list[Contract]:
        """Megatron's data sets, whose samples are looked up."""
        return [PLACES] if stored_names(recipe) else []

    def start(self, run: RunContext) -> RunPart | None:
        """Look at the manifests, and let samples say where their tokens stand."""
        if not stored_names(run.recipe):
            return None
        from megatron_moe_inject.teachers.store.part import StoresPart

        return StoresPart(run)
