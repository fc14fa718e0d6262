"""A feature: what a recipe may ask for, in one object of one room.

A feature owns its section of the recipe with the rules for it, the Megatron options that it does
not work with, its lines of the plan and its terms of the loss, and makes its part in a run
(``recipe.run_part``). Nothing here or in a feature's own module needs torch: recipes are read by
commands that only look at files. ``recipe.features`` lists all features.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.fields import weights_in
from megatron_moe_inject.recipe.refused_options import Refusal
from megatron_moe_inject.recipe.run_kinds import INJECTION
from megatron_moe_inject.recipe.schedule import Weight
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.recipe.section import Section

if TYPE_CHECKING:
    from argparse import Namespace

    from megatron_moe_inject.host.contract import Contract
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart

EVERYWHERE = "(all)"
"""Among the classes of a loss: what concerns no token."""


@dataclass(frozen=True)
class RefusedBeside:
    """Megatron options that do not go with one setting of a recipe.

    Attributes:
        options: which.
        setting: the setting, as tables name it.
        asked: whether the recipe uses it with this student.
        remedy: what to do instead of leaving the option out, such as ``set X to 0``.
        so_that: what follows from the option's reason, added to it.
    """

    options: Sequence[Refusal]
    setting: str
    asked: Callable[[Recipe, StudentFacts], bool]
    remedy: str
    so_that: str = ""

    def check(self, recipe: Recipe, facts: StudentFacts) -> None:
        """Raises ``RecipeError`` for the first option in use."""
        if not self.asked(recipe, facts):
            return
        for option in self.options:
            if option.matches(facts.options):
                raise RecipeError(
                    f"{option.flag}: {option.reason}{self.so_that}; remove it, or {self.remedy}",
                    option.flag,
                )


class Feature:
    """One feature; each method does nothing unless overridden.

    Attributes:
        section: its part of the recipe; ``None`` for what flags or other sections ask for.
        refuses: Megatron options that it does not work with.
        runs: kinds of runs that it may take part in, see ``run_kinds``.
    """

    section: Section[Any] | None = None
    refuses: Sequence[RefusedBeside] = ()
    runs: Collection[str] = (INJECTION,)

    def rules(self, recipe: Recipe) -> None:
        """Check what does not depend on the student, beyond types, words and weights.

        Raises:
            RecipeError: the first mistake found.
        """

    def check(self, recipe: Recipe, facts: StudentFacts) -> None:
        """Check the recipe, its experts resolved, against the student of an injection.

        Raises:
            RecipeError: the student lacks something, or cannot do it.
        """

    def renumbered(self, recipe: Recipe, number_of: Callable[[str, int], int]) -> Recipe:
        """The recipe with the layers that its section names in other numbers.

        Args:
            number_of: the number of a layer with an MLP, given its key and the number there.
        """
        return recipe

    def warnings(self, recipe: Recipe) -> list[str]:
        """What is allowed but worth a second look, one sentence each."""
        return []

    def kept_originals(self, recipe: Recipe) -> Collection[str] | None:
        """Components (``host.model_parts.COMPONENTS``) whose original values it needs where they
        train; ``None`` = all."""
        return ()

    def loss_terms(self, recipe: Recipe) -> list[tuple[str, str]]:
        """Its terms of the loss in words, each with its class of data or ``EVERYWHERE``."""
        return []

    def weights(self, recipe: Recipe) -> dict[str, Weight]:
        """Weights of its terms by key, for the report: those of its section."""
        if self.section is None:
            return {}
        return weights_in(self.section.key, recipe[self.section])

    def plan_lines(self, recipe: Recipe, facts: StudentFacts | None) -> Mapping[str, list[str]]:
        """Lines of the plan by their title, as far as recipe and student tell."""
        return {}

    def uses(
        self, recipe: Recipe, facts: StudentFacts | None, args: Namespace | None
    ) -> Sequence[Contract]:
        """What it uses of Megatron where a run asks for it, from its room's ``uses.py``.

        Args:
            recipe: checked.
            facts: the student; ``None`` = any, so that what depends on it counts as used.
            args: Megatron's arguments, where they are known.
        """
        return ()

    def foresee(self, recipe: Recipe, facts: StudentFacts, args: Namespace) -> list[str]:
        """What a run that trains would refuse or remark at start, as far as flags and files tell.

        ``moe-inject plan`` asks; a run finds the same in ``start``. Nothing is built or changed.

        Args:
            recipe: with its experts resolved as far as their profiles are there.
            facts: what is known of the student from the flags.
            args: Megatron's arguments, parsed and not validated.

        Returns:
            Remarks for the plan.

        Raises:
            RecipeError: the run would not start.
        """
        return []

    def start(self, run: RunContext) -> RunPart | None:
        """Its part in a run, ``None`` where the run asks for none.

        Called before anything is built; every rank fails alike, so no collective runs.

        Raises:
            RecipeError: it cannot work with these flags or files.
        """
        return None
