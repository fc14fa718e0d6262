"""Preference as a feature: pairs of answers beside the text, of which one is preferred."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from megatron_moe_inject.host.errors import RecipeError, fail, listing, suggest
from megatron_moe_inject.preference import uses
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.feature import Feature, RefusedBeside
from megatron_moe_inject.recipe.numbers import check_bounds
from megatron_moe_inject.recipe.preference import CLASS, Preference, measured_by_original
from megatron_moe_inject.recipe.refused_options import Refusal
from megatron_moe_inject.recipe.run_kinds import EVALUATION, INJECTION
from megatron_moe_inject.recipe.schedule import ever_positive, show_weight
from megatron_moe_inject.recipe.schema import Recipe

if TYPE_CHECKING:
    from argparse import Namespace

    from megatron_moe_inject.host.contract import Contract
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart

_KEY = "objective.preference"
_BETAS = 1e-6, 1e6
_TWICE = "also counts the attention of the passes that measure answers"
_NO_PASSES = (
    Refusal("sft", "reads conversations, where a sample is to be answers of pairs"),
    Refusal(
        "mtp_num_layers",
        "divides its loss by the unmasked tokens of each micro-batch, so that text would weigh by "
        "the answers beside it that are left out",
    ),
    Refusal("cuda_graph_impl", "replays what a step runs, where answers are to run before it"),
    Refusal("qk_clip", _TWICE),
    Refusal("log_max_attention_logit", _TWICE),
)


def _asked(recipe: Recipe, facts: StudentFacts) -> bool:
    return recipe.objective.preference is not None


class PreferenceFeature(Feature):
    """``objective.preference``."""

    runs = (INJECTION, EVALUATION)
    refuses = (RefusedBeside(_NO_PASSES, _KEY, _asked, f"leave {_KEY} out"),)

    def rules(self, recipe: Recipe) -> None:
        """A loss that has a weight, and a reference that there is."""
        pairs = recipe.objective.preference
        if pairs is None:
            return
        if not pairs.beta > 0:
            remedy = "write a number above 0, such as 0.1"
            raise fail(f"{_KEY}.beta", pairs.beta, "is not positive", remedy)
        check_bounds(f"{_KEY}.beta", pairs.beta, _BETAS)
        if not 0 <= pairs.label_smoothing < 0.5:
            raise fail(
                f"{_KEY}.label_smoothing", pairs.label_smoothing, "is not in [0, 0.5)",
                "write the share of pairs that may be the wrong way round, such as 0.1",
            )  # fmt: skip
        if not (ever_positive(pairs.coeff) or ever_positive(pairs.sft)):
            raise fail(
                f"{_KEY}.coeff", pairs.coeff, "weighs nothing, and neither does sft",
                f"give it a weight, or leave {_KEY} out",
            )  # fmt: skip
        _check_reference(recipe, pairs)

    def kept_originals(self, recipe: Recipe) -> Collection[str] | None:
        """All, where the original is the reference."""
        return None if measured_by_original(recipe.objective.preference) else ()

    def loss_terms(self, recipe: Recipe) -> list[tuple[str, str]]:
        """Of pairs, in words."""
        pairs = recipe.objective.preference
        if pairs is None:
            return []
        each = " for each token" if pairs.length_normalised else ""
        term = f"DPO(chosen > rejected{each}, beta={pairs.beta:g}, against {_reference(recipe)})"
        terms = [(CLASS, f"{show_weight(pairs.coeff)} * {term}")]
        if ever_positive(pairs.sft):
            terms.append((CLASS, f"{show_weight(pairs.sft)} * CE(chosen)"))
        return terms

    def plan_lines(self, recipe: Recipe, facts: StudentFacts | None) -> dict[str, list[str]]:
        """Where pairs come from."""
        pairs = recipe.objective.preference
        if pairs is None:
            return {}
        return {"preference": [f"pairs of answers: {listing(pairs.data, limit=4)}"]}

    def uses(
        self, recipe: Recipe, facts: StudentFacts | None, args: Namespace | None
    ) -> list[Contract]:
        """Data sets of pairs, and passes over them."""
        return [] if recipe.objective.preference is None else [uses.PREFERENCE]

    def start(self, run: RunContext) -> RunPart | None:
        """Takes part in training, and where held-out pairs are measured."""
        if run.recipe.objective.preference is None:
            return None
        from megatron_moe_inject.preference.part import PreferencePart

        return PreferencePart(run)


def _reference(recipe: Recipe) -> str:
    return recipe.reference_teacher() or "the original"


def _check_reference(recipe: Recipe, pairs: Preference) -> None:
    """The reference is there and can be asked of every answer."""
    if pairs.reference == "original":
        if pairs.teacher is not None:
            raise fail(
                f"{_KEY}.teacher", pairs.teacher, "stands beside reference: original",
                "write reference: teacher, or remove it",
            )  # fmt: skip
        return
    if not recipe.teachers:
        raise fail(
            f"{_KEY}.reference", "teacher", "is missing: the recipe has no teacher",
            "add one under teachers, or write reference: original",
        )  # fmt: skip
    if pairs.teacher is None and len(recipe.teachers) > 1:
        raise RecipeError(
            f"{_KEY}.teacher: missing; name one of {listing(recipe.teachers)}", f"{_KEY}.teacher"
        )
    name = recipe.reference_teacher()
    if name not in recipe.teachers:
        remedy = suggest(str(name), list(recipe.teachers), "teachers")
        raise fail(f"{_KEY}.teacher", name, "is no teacher", remedy)
    spec = recipe.teachers[name]
    if spec.aligned:
        raise fail(
            f"teachers.{name}.align", spec.align, "has another tokenizer than answers of pairs",
            f"measure them against another teacher ({_KEY}.teacher), or reference: original",
        )  # fmt: skip
    if spec.window:
        raise fail(
            f"teachers.{name}.window", spec.window, "splits the step's teacher forward, and all "
            "answers of a batch are measured at once",
            f"write window: 0, or {_KEY}.reference: original",
        )  # fmt: skip
