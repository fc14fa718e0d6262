"""Retention as features: the original values that it needs, and what holds to them."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.host.labels import GENERAL
from megatron_moe_inject.recipe.entries import split_labels
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.feature import EVERYWHERE, Feature, RefusedBeside
from megatron_moe_inject.recipe.features import FEATURES
from megatron_moe_inject.recipe.refused_options import (
    FP8_PARAMETERS,
    GRAPHS_OF_LAYERS,
    NO_PARTS,
    Refusal,
)
from megatron_moe_inject.recipe.schedule import Weight, ever_positive, show_weight
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.retention import uses
from megatron_moe_inject.retention.section import RETENTION

if TYPE_CHECKING:
    from argparse import Namespace

    from megatron_moe_inject.host.contract import Contract
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart

_LOGITS = "also counts the attention of the original model, which runs in between"
_NO_ORIGINAL_PASS = (
    Refusal("cuda_graph_impl", "replays the trained weights where the original should run"),
    Refusal("qk_clip", _LOGITS),
    Refusal("log_max_attention_logit", _LOGITS),
)
_NO_SECOND_RUN = (
    Refusal("moe_token_dispatcher_type", "does not send the sign of gates along", value="flex"),
    *(
        Refusal(name, "does not let experts run again as they were")
        for name in ("fp8", "fp4", "fine_grained_activation_offloading")
    ),
    GRAPHS_OF_LAYERS,
)


def kept_originals(recipe: Recipe) -> list[str] | None:
    """Components whose originals some feature needs, where they train; one copy serves all.

    ``None`` = all components, ``[]`` = nothing is kept.
    """
    names: set[str] = set()
    for feature in FEATURES:
        components = feature.kept_originals(recipe)
        if components is None:
            return None
        names |= set(components)
    return sorted(names)


class Originals(Feature):
    """The original values of what trains, and with ``objective.gamma`` the original model."""

    refuses = (
        RefusedBeside(
            (FP8_PARAMETERS,),
            "retention.originals: host",
            lambda recipe, facts: recipe[RETENTION].originals == "host",
            "set retention.originals to device",
        ),
        RefusedBeside(
            _NO_ORIGINAL_PASS,
            "objective.gamma",
            lambda recipe, facts: ever_positive(recipe.objective.gamma),
            "set objective.gamma to 0",
        ),
    )

    def rules(self, recipe: Recipe) -> None:
        """A place for originals is named only where some are kept."""
        if recipe[RETENTION].originals == "host" and kept_originals(recipe) == []:
            raise fail(
                "retention.originals", "host", "keeps nothing, since no retention is used",
                "set objective.gamma or another retention, or remove it",
            )  # fmt: skip

    def check(self, recipe: Recipe, facts: StudentFacts) -> None:
        """There is general data to hold."""
        _check_general("objective.gamma", recipe.objective.gamma, recipe, facts)

    def kept_originals(self, recipe: Recipe) -> Collection[str] | None:
        """All, for the original model."""
        return None if ever_positive(recipe.objective.gamma) else ()

    def plan_lines(self, recipe: Recipe, facts: StudentFacts | None) -> dict[str, list[str]]:
        """Where they are kept."""
        if kept_originals(recipe) == []:
            return {}
        where = {"device": "on the device", "host": "in host memory"}[recipe[RETENTION].originals]
        return {"retention": [f"the original values of what trains are kept {where}"]}

    def uses(
        self, recipe: Recipe, facts: StudentFacts | None, args: Namespace | None
    ) -> list[Contract]:
        """Keeping them, and running the original model."""
        return [] if kept_originals(recipe) == [] else [uses.ORIGINALS]

    def start(self, run: RunContext) -> RunPart | None:
        """Keeps them."""
        if kept_originals(run.recipe) == []:
            return None
        from megatron_moe_inject.retention.part import OriginalsPart

        return OriginalsPart(run, kept_originals(run.recipe))


class RetentionFeature(Feature):
    """``retention``: experts held to their outputs, parameters to their start."""

    section = RETENTION
    refuses = (
        RefusedBeside(
            _NO_SECOND_RUN,
            "retention.experts",
            lambda recipe, facts: "experts" in recipe[RETENTION].in_use(),
            "set retention.experts to 0",
        ),
        RefusedBeside(
            NO_PARTS,
            "retention.experts, with --moe-grouped-gemm",
            lambda recipe, facts: (
                facts.precision.grouped_gemm and "experts" in recipe[RETENTION].in_use()
            ),
            "set retention.experts to 0",
        ),
    )

    def rules(self, recipe: Recipe) -> None:
        """Experts that are held must train."""
        train, retention = recipe.train, recipe[RETENTION]
        trained = train.experts != "none" or train.layers or train.patterns
        if "experts" in retention.in_use() and not trained:
            raise fail(
                "retention.experts", retention.experts, "holds experts, but none train",
                "set train.experts to selected or all, or remove it",
            )  # fmt: skip
        if "l2" in retention.in_use() and not train.whole:
            raise fail(
                "retention.l2", retention.l2, "pulls parameters of the student to their start, but "
                "none of them trains", "use decay of train.adapters, or remove it",
            )  # fmt: skip

    def check(self, recipe: Recipe, facts: StudentFacts) -> None:
        """There are experts, and general data to hold."""
        retention = recipe[RETENTION]
        if "experts" in retention.in_use() and facts.num_moe_experts is None:
            raise fail(
                "retention.experts", retention.experts, "holds experts, and the student is dense "
                "(no --num-experts)", "set it to 0; objective.gamma holds any student",
            )  # fmt: skip
        _check_general("retention.experts", recipe[RETENTION].experts, recipe, facts)

    def kept_originals(self, recipe: Recipe) -> Collection[str] | None:
        """The experts', or all for the pull to the start."""
        in_use = recipe[RETENTION].in_use()
        return None if "l2" in in_use else ("experts",) if in_use else ()

    def warnings(self, recipe: Recipe) -> list[str]:
        """General tokens that nothing holds."""
        held = (recipe.general_beta(), recipe.objective.gamma, recipe[RETENTION].experts)
        if any(map(ever_positive, held)):
            return []
        return ["general tokens have no loss: nothing holds general ability"]

    def loss_terms(self, recipe: Recipe) -> list[tuple[str, str]]:
        """Those in use."""
        retention, terms = recipe[RETENTION], []
        if "experts" in retention.in_use():
            weight = show_weight(retention.experts)
            terms.append(("general", f"{weight} * change of trained experts' outputs"))
        if "l2" in retention.in_use():
            weight = show_weight(retention.l2)
            terms.append((EVERYWHERE, f"{weight} / 2 * |parameters - start|^2"))
        return terms

    def uses(
        self, recipe: Recipe, facts: StudentFacts | None, args: Namespace | None
    ) -> list[Contract]:
        """Of experts that are held, and of the optimizer with L2."""
        parts = {"experts": uses.EXPERT_RETENTION, "l2": uses.L2}
        return [parts[name] for name in recipe[RETENTION].in_use() if name in parts]

    def start(self, run: RunContext) -> RunPart | None:
        """Holds them."""
        if not run.recipe[RETENTION].in_use():
            return None
        from megatron_moe_inject.retention.part import RetentionPart

        return RetentionPart(run)


def _check_general(key: str, weight: Weight, recipe: Recipe, facts: StudentFacts) -> None:
    if ever_positive(weight) and GENERAL not in split_labels(recipe, facts, "train"):
        raise fail(
            key, weight, "weighs retention on general data, but every dataset belongs to a domain",
            "add general data to --data-path (5 to 10 %) or set it to 0",
        )  # fmt: skip
