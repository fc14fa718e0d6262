"""What would help where ranks do not fit: one change at a time, each planned as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.planning.client import Planner
from megatron_moe_inject.planning.job_plan import JobPlan
from megatron_moe_inject.planning.report import GIB, Memory
from megatron_moe_inject.planning.suggest import RECOMPUTE, Model
from megatron_moe_inject.recipe.load import dump_recipe, recipe_from_yaml


@dataclass(frozen=True)
class Remedy:
    """One change.

    Attributes:
        flags: of Megatron's, to be given as well.
        overrides: of the recipe, as ``--inject-set`` takes them.
    """

    flags: Sequence[str] = ()
    overrides: Sequence[str] = ()

    @property
    def text(self) -> str:
        """What is to be written."""
        return " ".join([*self.flags, *(f"--inject-set {each}" for each in self.overrides)])


def remedies(plan: JobPlan, flags: Sequence[str], model: Model) -> Iterator[Remedy]:
    """Changes that the job and its number of GPUs allow."""
    layout, worst = plan.layout, plan.worst
    if "--use-distributed-optimizer" not in flags and worst.optimizer and layout.dp_cp > 1:
        yield Remedy(("--use-distributed-optimizer",))
    if not {"--recompute-granularity", "--recompute-activations"} & set(flags):
        yield Remedy(RECOMPUTE["full"])
    ep, tp = 2 * layout.ep, 2 * layout.tp
    divides = model.experts and model.experts % ep == 0
    if divides and layout.gpus % (layout.etp * ep * layout.pp) == 0:
        yield Remedy(("--expert-model-parallel-size", str(ep)))
    fits = layout.gpus % (tp * layout.cp * layout.pp) == 0
    if fits and model.groups % tp == 0 and model.heads % tp == 0:
        experts = ("--expert-tensor-parallel-size", str(layout.etp)) if model.experts else ()
        sizes = ("--tensor-model-parallel-size", str(tp), "--sequence-parallel")
        yield Remedy((*sizes, *experts))
    if worst.originals:
        yield Remedy(overrides=("retention.originals=host",))


def remedy_lines(
    planner: Planner,
    recipe: str,
    flags: Sequence[str],
    plan: JobPlan,
    model: Model,
    memory: Memory,
) -> list[str]:
    """What each change does, planned; those that help, the most helpful first.

    Args:
        recipe: YAML, its experts resolved.
        plan: the one that does not fit.
    """
    found = []
    for remedy in remedies(plan, flags, model):
        changed = recipe
        if remedy.overrides:
            changed = dump_recipe(recipe_from_yaml(recipe, remedy.overrides))
        try:
            answer = planner.plan(
                changed, [*flags, *remedy.flags], plan.layout.gpus, memory=memory.total
            )
        except RecipeError:
            continue  # Megatron or the recipe does not go with it
        found.append((answer.plan.worst.peak, remedy))
    lines = []
    for peak, remedy in sorted(found, key=lambda pair: pair[0]):
        if peak >= plan.worst.peak:
            continue
        over = (peak - memory.usable) / GIB
        ends = "fits" if over <= 0 else f"still {over:.2f} GiB too much"
        lines.append(f"with {remedy.text}: {peak / GIB:.2f} GiB at most, {ends}")
    return lines or ["none of the changes that were planned helps; try --suggest"]
