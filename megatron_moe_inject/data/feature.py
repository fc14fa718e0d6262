"""The student's data as features: its files, its validation sets, the shares of its classes."""

from __future__ import annotations

import copy
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from megatron_moe_inject.data import uses
from megatron_moe_inject.data.files_there import check_data_files
from megatron_moe_inject.data.section import MIXING, ordered, scheduled
from megatron_moe_inject.host.errors import RecipeError, fail, suggest
from megatron_moe_inject.host.labels import PREFERENCE
from megatron_moe_inject.host.text import table
from megatron_moe_inject.recipe.entries import split_labels
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.feature import Feature, RefusedBeside
from megatron_moe_inject.recipe.fields import check_weight
from megatron_moe_inject.recipe.numbers import SHARES, check_bounds
from megatron_moe_inject.recipe.preference import CLASS
from megatron_moe_inject.recipe.refused_options import Refusal
from megatron_moe_inject.recipe.run_kinds import EVALUATION, GENERATION, INJECTION, PROFILE
from megatron_moe_inject.recipe.schedule import (
    Schedule,
    ever_positive,
    highest,
    show_weight,
    value_at,
)
from megatron_moe_inject.recipe.schema import Recipe

if TYPE_CHECKING:
    from argparse import Namespace

    from megatron_moe_inject.host.contract import Contract
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart

_NOT_BY_POSITION = "does not take samples in the order of their iterations"
_NO_SCHEDULE = (
    Refusal("dataloader_type", _NOT_BY_POSITION, value="cyclic"),
    Refusal("dataloader_type", "leaves Megatron's blend out", value="external"),
    Refusal("phase_transition_iterations", "counts samples anew in each phase"),
    Refusal("decrease_batch_size_if_needed", "lets the batch size depend on the number of ranks"),
)


class DataFiles(Feature):
    """The files of the data are where the flags say."""

    runs = (INJECTION, EVALUATION, PROFILE)

    def foresee(self, recipe: Recipe, facts: StudentFacts, args: Namespace) -> list[str]:
        """Looks for all of them."""
        check_data_files(args, facts)
        return []

    def start(self, run: RunContext) -> RunPart | None:
        """The first rank looks, before anything is written; not every rank reads data."""
        if not getattr(run.args, "rank", 0):
            check_data_files(run.args, run.facts, other_formats=True)
        return None


class HeldOutPairsOfAnswers(Feature):
    """Pairs of answers among the validation data are evaluated as pairs, and not as text."""

    runs = (INJECTION, EVALUATION, PROFILE, GENERATION)

    def check(self, recipe: Recipe, facts: StudentFacts) -> None:
        """They are where they are found."""
        _check_held_out_pairs(recipe, facts)

    def uses(
        self, recipe: Recipe, facts: StudentFacts | None, args: Namespace | None
    ) -> list[Contract]:
        """Their files, and an evaluation of them."""
        return [uses.HELD_OUT_PAIRS] if recipe.objective.preference is not None else []

    def start(self, run: RunContext) -> RunPart | None:
        """Takes them out of the validation data where these are named by themselves; whoever
        measures them says so."""
        _check_held_out_pairs(run.recipe, run.facts)
        named = run.args.valid_data_path or run.args.per_split_data_args_path
        if not named or PREFERENCE not in run.labels["valid"]:
            return None
        from megatron_moe_inject.data.held_out_pairs import HeldOutPairs

        pairs = HeldOutPairs(run)
        run.provide(HeldOutPairs, pairs)
        return pairs


def _check_held_out_pairs(recipe: Recipe, facts: StudentFacts) -> None:
    """Held-out pairs are named by themselves, beside text that Megatron evaluates on."""
    options, pairs = facts.options, recipe.objective.preference
    if pairs is None or not (options.get("eval_iters") or options.get("full_validation")):
        return
    key, one_blend = "objective.preference.data", options.get("data_path")
    for split in (split for split in ("valid", "test") if split in facts.data_paths):
        labels = split_labels(recipe, facts, split)
        if PREFERENCE not in labels:
            continue
        if split == "test" or one_blend or options.get("data_args_path"):
            raise fail(
                key, pairs.data, f"is in the {split} data, too, where pairs are not measured",
                "name the data by --train-data-path, held-out text and pairs by --valid-data-path",
            )  # fmt: skip
        if set(labels) == {PREFERENCE}:
            raise fail(
                key, pairs.data, "is all of the validation data, and Megatron's own evaluation "
                "reads text", "name text beside the pairs by --valid-data-path",
            )  # fmt: skip


class SeveralValidationSets(Feature):
    """``--multiple-validation-sets`` with ``--full-validation``: each set is a class of its own."""

    runs = (INJECTION, EVALUATION, PROFILE)
    refuses = (
        RefusedBeside(
            (Refusal("full_validation", "ends Megatron's own evaluation in an error"),),
            "one validation set",
            lambda recipe, facts: not facts.options.get("multiple_validation_sets"),
            "add --multiple-validation-sets",
        ),
        RefusedBeside(
            (Refusal("multiple_validation_sets", "is read by Megatron only whole"),),
            "validation sets that are not read whole",
            lambda recipe, facts: not facts.options.get("full_validation"),
            "add --full-validation",
        ),
        RefusedBeside(
            (Refusal("multiple_validation_sets", "reads each set whole, without a weight"),),
            "validation data with weights",
            lambda recipe, facts: _has_weights(recipe, facts),
            "name the data by --train-data-path and --valid-data-path, the latter without weights",
        ),
        RefusedBeside(
            (Refusal("dataloader_type", "leaves Megatron's sets out", value="external"),),
            "several validation sets",
            lambda recipe, facts: bool(facts.options.get("multiple_validation_sets")),
            "remove --multiple-validation-sets",
        ),
    )

    def uses(
        self, recipe: Recipe, facts: StudentFacts | None, args: Namespace | None
    ) -> list[Contract]:
        """What says to Megatron's loader how it makes batches."""
        asked = facts is None or facts.options.get("multiple_validation_sets")
        return [uses.VALIDATION_SETS] if asked else []

    def start(self, run: RunContext) -> RunPart | None:
        """Take them over, so that each sample of them counts once."""
        if not (run.args.multiple_validation_sets or run.args.full_validation):
            return None
        if run.kind == PROFILE:
            raise RecipeError(
                "--full-validation: fills up the last batch of each set, which a routing profile "
                "would count; remove it and --multiple-validation-sets, and use --eval-iters"
            )
        from megatron_moe_inject.data.validation_sets import ValidationSets

        sets = ValidationSets(run.args, len(run.labels["valid"]))
        run.provide(ValidationSets, sets)
        return sets


def _has_weights(recipe: Recipe, facts: StudentFacts) -> bool:
    """Whether Megatron's blend of validation data has weights, of its own or by ``mixing``."""
    if not facts.options.get("multiple_validation_sets") or facts.mock_data:
        return False
    from megatron.training.utils import get_blend_and_blend_per_split

    args = Namespace(**facts.options)
    blend, per_split = get_blend_and_blend_per_split(args)
    if blend is not None:
        return blend[1] is not None or bool(recipe[MIXING])
    valid = None if per_split is None else per_split[1]
    return valid is not None and valid[1] is not None


class Mixing(Feature):
    """``mixing``: shares of the blend, also such that change by iteration."""

    section = MIXING
    runs = (INJECTION, EVALUATION, PROFILE)
    refuses = (
        RefusedBeside(
            _NO_SCHEDULE,
            "mixing with a schedule",
            lambda recipe, facts: scheduled(recipe),
            "set the shares of mixing to numbers",
        ),
        RefusedBeside(
            _NO_SCHEDULE,
            "objective.preference",
            lambda recipe, facts: recipe.objective.preference is not None,
            "leave objective.preference out",
        ),
    )

    def rules(self, recipe: Recipe) -> None:
        """Shares of classes that there are, each in [0, 1], and at most 1 in sum."""
        known = ["general", *(domain.name for domain in recipe.domains)]
        if recipe.objective.preference is not None:
            known.append(CLASS)
            if CLASS not in recipe[MIXING]:
                raise RecipeError(
                    f"mixing.{CLASS}: missing; objective.preference needs the share of its pairs "
                    f"in the training data, as in {CLASS}: 0.25",
                    f"mixing.{CLASS}",
                )
        shares, points = recipe[MIXING], {0}
        for name, share in shares.items():
            key = f"mixing.{name}"
            if name not in known:
                remedy = suggest(name, known, "it may name")
                raise fail(key, share, "is the share of no domain", remedy)
            if isinstance(share, Schedule):
                check_weight(key, share)
                points |= set(share.points)
                if highest(share) > 1:
                    raise fail(key, highest(share), "is not in [0, 1]", "write shares such as 0.1")
                if not ever_positive(share):
                    remedy = "remove the data or its share"
                    raise fail(key, share, "is 0 at every iteration", remedy)
            elif not 0 < share <= 1:
                raise fail(key, share, "is not in (0, 1]", "write a share such as 0.1")
            else:
                check_bounds(key, share, SHARES)
        for iteration in sorted(points):
            if sum(value_at(share, iteration) for share in shares.values()) > 1 + 1e-6:
                where = "" if points == {0} else f" at iteration {iteration}"
                raise fail("mixing", shares, f"is more than 1 in sum{where}", "lower the shares")

    def plan_lines(self, recipe: Recipe, facts: StudentFacts | None) -> dict[str, list[str]]:
        """The shares asked for, in the order of the domains."""
        shares = recipe[MIXING]
        names = [*(domain.name for domain in recipe.domains), "general", CLASS]
        pairs: list[tuple[str, Any]] = [(name, shares[name]) for name in names if name in shares]
        own = ("general", CLASS)
        rows = [(f"({n})" if n in own else n, "=", show_weight(share)) for n, share in pairs]
        return {"mixing": table(rows)} if rows else {}

    def uses(
        self, recipe: Recipe, facts: StudentFacts | None, args: Namespace | None
    ) -> list[Contract]:
        """Megatron's blend."""
        return [uses.MIXING] if recipe[MIXING] else []

    def foresee(self, recipe: Recipe, facts: StudentFacts, args: Namespace) -> list[str]:
        """Shares that the blend cannot have or does not have; of those that change by iteration
        only a run knows the sizes of the batches."""
        from megatron_moe_inject.data.mixing import mix

        if not ordered(recipe):
            mix(recipe, copy.copy(args), facts)
        return []

    def start(self, run: RunContext) -> RunPart | None:
        """Give the blend its weights, and where they change its order."""
        from megatron_moe_inject.data.mixing import mix, mix_held_out
        from megatron_moe_inject.data.scheduled_blend import BlendSchedule

        if run.kind != INJECTION:
            mix_held_out(run.recipe, run.args, run.facts)
            return None
        order = mix(run.recipe, run.args, run.facts)
        if order is None:
            return None
        schedule = BlendSchedule(order, run.facts.data_paths["train"], run.args)
        run.provide(BlendSchedule, schedule)
        return schedule
