"""Imitation of the teachers' layers as a feature."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_moe_inject.host.errors import fail
from megatron_moe_inject.recipe.feature import Feature, RefusedBeside
from megatron_moe_inject.recipe.refused_options import GRAPHS_OF_LAYERS, Refusal
from megatron_moe_inject.recipe.schedule import show_weight
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.teachers.imitation.section import IMITATION
from megatron_moe_inject.teachers.uses import IMITATION as IMITATES

if TYPE_CHECKING:
    from argparse import Namespace

    from megatron_moe_inject.host.contract import Contract
    from megatron_moe_inject.recipe.facts import StudentFacts
    from megatron_moe_inject.recipe.run_part import RunContext, RunPart

_IMITATED = {"hidden": "hidden states", "experts": "expert outputs"}
_COMBINE = "cannot combine the outputs of some experts a second time"
_NO_SECOND_COMBINE = (
    Refusal("moe_token_dispatcher_type", _COMBINE, value="flex"),
    Refusal("moe_shared_expert_overlap", _COMBINE),
    Refusal("moe_latent_size", "gives experts outputs of another width than the layer's"),
)
_PARTS_OF_LAYERS = Refusal(
    "overlap_moe_expert_parallel_comm",
    "runs layers in parts, each with a backward of its own, so that there is no place for a loss "
    "on what a layer puts out",
)


class ImitationFeature(Feature):
    """``imitation``: hidden states and expert outputs after the teachers' layers."""

    section = IMITATION
    refuses = (
        RefusedBeside(
            (GRAPHS_OF_LAYERS, _PARTS_OF_LAYERS),
            "imitation.hidden",
            lambda recipe, facts: "hidden" in recipe[IMITATION].in_use(),
            "set imitation.hidden to 0",
        ),
        RefusedBeside(
            (GRAPHS_OF_LAYERS, _PARTS_OF_LAYERS, *_NO_SECOND_COMBINE),
            "imitation.experts",
            lambda recipe, facts: "experts" in recipe[IMITATION].in_use(),
            "set imitation.experts to 0",
        ),
    )

    def rules(self, recipe: Recipe) -> None:
        """Some domain has a teacher whose states of a whole step are there, and experts."""
        imitation = recipe[IMITATION]
        in_use = imitation.in_use()
        for name, spec in recipe.teachers.items():
            if spec.layers and not in_use:
                raise fail(
                    f"teachers.{name}.layers", spec.layers, "names layers that nothing imitates",
                    "set imitation.hidden or imitation.experts above 0, or remove it",
                )  # fmt: skip
            if spec.window and in_use:
                raise fail(
                    f"teachers.{name}.window", spec.window, "splits the step's teacher forward",
                    "imitation sends the states of a whole step to other stages at once: write 0",
                )  # fmt: skip
        if not in_use:
            return
        taught = [(i, domain) for i, domain in enumerate(recipe.domains) if domain.teacher]
        if not taught:
            raise fail(
                f"imitation.{in_use[0]}", getattr(imitation, in_use[0]),
                "weighs imitation but no domain has a teacher",
                "add domains[0].teacher or set it to 0",
            )  # fmt: skip
        for i, domain in taught if "experts" in in_use else ():
            if not domain.experts.layers:
                raise fail(
                    f"domains[{i}].experts.layers", {},
                    f"has no experts to imitate {domain.taught_by}",
                    "write {layer: [expert ids]} or set imitation.experts to 0",
                )  # fmt: skip

    def loss_terms(self, recipe: Recipe) -> list[tuple[str, str]]:
        """One for each kind of states and domain with a teacher."""
        imitation = recipe[IMITATION]
        return [
            (
                domain.name,
                f"{show_weight(getattr(imitation, name))} * "
                f"{imitation.loss}({_IMITATED[name]}, {domain.taught_by})",
            )
            for domain in recipe.domains
            for name in (imitation.in_use() if domain.teacher else ())
        ]

    def uses(
        self, recipe: Recipe, facts: StudentFacts | None, args: Namespace | None
    ) -> list[Contract]:
        """Layers and experts whose states imitate."""
        return [IMITATES] if recipe[IMITATION].in_use() else []

    def start(self, run: RunContext) -> RunPart | None:
        """Find the layers and the checkpoint's projections."""
        if not run.recipe[IMITATION].in_use():
            return None
        from megatron_moe_inject.teachers.imitation.part import ImitationPart

        return ImitationPart(run)
