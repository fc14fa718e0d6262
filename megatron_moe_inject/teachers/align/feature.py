"""Teachers with another tokenizer as a feature: what a recipe and its data may ask of them."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.feature import Feature
from megatron_moe_inject.recipe.run_kinds import EVALUATION, INJECTION
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.teachers.align.rules import check_data, check_rules

if TYPE_CHECKING:
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart


class AlignedFeature(Feature):
    """``teachers.NAME.align``: texts are compared, not ids."""

    runs = (INJECTION, EVALUATION)

    def rules(self, recipe: Recipe) -> None:
        """Nothing that needs more of a teacher than how likely it finds a text."""
        check_rules(recipe)

    def foresee(self, recipe: Recipe, facts: StudentFacts, args: Namespace) -> list[str]:
        """Data whose documents no text is read as."""
        check_data(recipe, args)
        return []

    def start(self, run: RunContext) -> RunPart | None:
        """The same of a run."""
        check_data(run.recipe, run.args)
        return None
