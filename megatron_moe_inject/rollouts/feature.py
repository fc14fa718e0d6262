"""Rollouts as a feature: what a recipe may say of them, and their part in a run."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import TYPE_CHECKING

from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.recipe.entries import ROLLOUTS_KIND
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.feature import Feature, RefusedBeside
from megatron_moe_inject.recipe.refused_options import Refusal
from megatron_moe_inject.recipe.run_kinds import GENERATION
from megatron_moe_inject.recipe.schedule import Weight
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.rollouts import uses
from megatron_moe_inject.rollouts.section import ROLLOUTS, Rollouts, folder_of

if TYPE_CHECKING:
    from megatron_moe_inject.host.contract import Contract
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart

_OTHER_ORDER = "deals samples to ranks in an order of their own"
_FIXED_BORDERS = "puts borders of the fixed text into masks and positions"
_NO_PLACES = (
    Refusal("dataloader_type", _OTHER_ORDER, value="cyclic"),
    Refusal("dataloader_type", "gives batches of a kind of its own", value="external"),
    Refusal("reset_position_ids", _FIXED_BORDERS),
    Refusal("reset_attention_mask", _FIXED_BORDERS),
    Refusal("sft", "gives conversations, whose packs have other borders"),
)
_MEANS_OF_PARTS = (
    Refusal(
        "context_parallel_size",
        "takes the mean of each rank's part of a sample, of which other numbers of tokens count",
        unset=1,
    ),
)
_REMEDY = "leave the folder of rollouts out"


def has_rollouts(recipe: Recipe) -> bool:
    """Whether a domain has a folder of rollouts."""
    return any(folder_of(domain) is not None for domain in recipe.domains)


class RolloutsFeature(Feature):
    """``data: [..., "rollouts:/dir"]``: text that the student wrote, while it is being written."""

    section = ROLLOUTS
    refuses = (
        RefusedBeside(
            _NO_PLACES, "rollouts: in data", lambda recipe, facts: has_rollouts(recipe), _REMEDY
        ),
        RefusedBeside(
            _MEANS_OF_PARTS,
            "rollouts: in data, without --calculate-per-token-loss",
            lambda recipe, facts: (
                has_rollouts(recipe) and not facts.options.get("calculate_per_token_loss")
            ),
            "add --calculate-per-token-loss",
        ),
    )

    def rules(self, recipe: Recipe) -> None:
        """A domain has one folder of its own, beside fixed text whose places it takes."""
        owners: dict[str, str] = {}
        for i, domain in enumerate(recipe.domains):
            own = [
                (j, entry)
                for j, entry in enumerate(domain.data)
                if isinstance(entry, str) and entry.startswith(ROLLOUTS_KIND)
            ]
            for place, (j, named) in enumerate(own):
                key = f"domains[{i}].data[{j}]"
                if not named.removeprefix(ROLLOUTS_KIND):
                    raise fail(key, named, "names no folder", "write such as rollouts:/data/own")
                if place:
                    raise fail(
                        key, named, "is a second folder of rollouts",
                        "write all into one folder, or make a domain for each",
                    )  # fmt: skip
                if len(domain.data) == 1:
                    raise fail(
                        key, named, "stands alone, and rollouts take the places of fixed text",
                        "name an entry of --data-path beside it, such as the text that the "
                        "prompts are from; its weight in the blend (mixing) is their share",
                    )  # fmt: skip
                folder = os.path.realpath(named.removeprefix(ROLLOUTS_KIND))
                if (owner := owners.setdefault(folder, key)) != key:
                    raise fail(
                        key, named, f"is the folder of {owner} too, by another name",
                        "each text is read for one domain; give each a folder",
                    )  # fmt: skip
                self._check_teachers(recipe, i, key)
        for j, entry in enumerate(recipe.general_data):
            if isinstance(entry, str) and entry.startswith(ROLLOUTS_KIND):
                raise fail(
                    f"general_data[{j}]", entry, "is text that a student wrote for a domain",
                    "name it in the data of a domain",
                )  # fmt: skip
        self._check_settings(recipe, recipe[ROLLOUTS])

    def _check_teachers(self, recipe: Recipe, index: int, key: str) -> None:
        for name in recipe.domains[index].teacher_weights:
            spec = recipe.teachers.get(name)
            if spec is not None and spec.kind == "store":
                raise fail(
                    f"domains[{index}].teacher", name,
                    f"is a store, which knows nothing of text that is still to be written ({key})",
                    "teach it by megatron:, hf: or server:",
                )  # fmt: skip

    def _check_settings(self, recipe: Recipe, spec: Rollouts) -> None:
        if spec != Rollouts() and not has_rollouts(recipe):
            raise fail(
                "rollouts", "(settings)", "are about rollouts, of which no domain has any",
                "name a folder, as in data: [1, rollouts:/data/own], or remove them",
            )  # fmt: skip
        if spec.every < 1:
            raise fail("rollouts.every", spec.every, "is no number of steps", "write 1 or more")
        if not 0 < spec.patience < 1e6:
            raise fail("rollouts.patience", spec.patience, "is no time", "write seconds")
        if spec.max_age is not None and spec.max_age < 1:
            raise fail(
                "rollouts.max_age", spec.max_age, "is no number of steps",
                "write 1 or more, or leave it out for rollouts of any age",
            )  # fmt: skip
        if spec.stale != "refuse" and spec.max_age is None:
            raise fail(
                "rollouts.stale", spec.stale, "weighs what is older than no age",
                "write rollouts.max_age",
            )  # fmt: skip

    def weights(self, recipe: Recipe) -> dict[str, Weight]:
        """None: it weighs no loss."""
        return {}

    def check(self, recipe: Recipe, facts: StudentFacts) -> None:
        """There is fixed text."""
        if has_rollouts(recipe) and facts.mock_data:
            i = next(i for i, d in enumerate(recipe.domains) if folder_of(d) is not None)
            raise fail(
                f"domains[{i}].data", recipe.domains[i].data,
                "has rollouts beside --mock-data", "name data by --data-path",
            )  # fmt: skip

    def warnings(self, recipe: Recipe) -> list[str]:
        """Cross-entropy on what the student wrote teaches it nothing."""
        found = []
        for domain in recipe.domains:
            if folder_of(domain) is not None and recipe.beta(domain) != 0:
                found.append(
                    f"domain {domain.name}: cross-entropy (beta) on text of the student's own "
                    "teaches it what it says already; write beta: 0.0 there"
                )
        return found

    def plan_lines(self, recipe: Recipe, facts: StudentFacts | None) -> dict[str, list[str]]:
        """Which domain reads which folder, and how."""
        spec = recipe[ROLLOUTS]
        lines = [
            f"{domain.name} <- {folder_of(domain)}"
            for domain in recipe.domains
            if folder_of(domain) is not None
        ]
        if not lines:
            return {}
        if spec.late == "wait":
            late = f"waited for, {spec.patience:g} s at most"
        else:
            late = "fixed text instead"
        age = "of any age"
        if spec.max_age is not None:
            older = "not read" if spec.stale == "refuse" else "read more rarely"
            age = f"older than {spec.max_age} steps: {older}"
        lines += [f"looked for every {spec.every} steps; too few: {late}; {age}"]
        return {"rollouts": lines}

    def uses(
        self, recipe: Recipe, facts: StudentFacts | None, args: Namespace | None
    ) -> list[Contract]:
        """What says how many samples were read."""
        return [uses.READING] if has_rollouts(recipe) else []

    def start(self, run: RunContext) -> RunPart | None:
        """Write over samples, where a domain has a folder."""
        if not has_rollouts(run.recipe):
            return None
        from megatron_moe_inject.rollouts.part import RolloutsPart

        return RolloutsPart(run)


_WHOLE = "divides the text of which one token after another is written"
_NO_LOOP = (
    Refusal("context_parallel_size", _WHOLE, unset=1),
    Refusal("mtp_num_layers", "predicts several tokens at once"),
)


class GenerationFeature(Feature):
    """``moe-inject rollouts``: a saved student writes, at the layout of its training command."""

    runs = (GENERATION,)
    refuses = (
        RefusedBeside(
            _NO_LOOP,
            "moe-inject rollouts",
            lambda recipe, facts: True,
            "write with --server (a checkpoint loads at any layout)",
        ),
    )

    def uses(
        self, recipe: Recipe, facts: StudentFacts | None, args: Namespace | None
    ) -> list[Contract]:
        """Megatron's schedules, and its data sets for prompts."""
        return [uses.WRITING]

    def start(self, run: RunContext) -> RunPart | None:
        """Write when the student is there."""
        from megatron_moe_inject.rollouts.generation_part import GenerationPart

        return GenerationPart(run)
