"""Expert parallelism of teachers that are mixtures of experts, apart from the student's.

A teacher with ``ep: n`` has its experts in n parts, one on each of n ranks of a pipeline stage that
holds it, whatever the student's own layout is: ranks of one stage, in their order, form groups of
n. Everything else of the teacher is whole on each. Tokens travel to their experts and back inside
its forward pass, so that all ranks of a group must run as many passes. Each has its own samples:
before they begin they agree over gloo on the most, and who has fewer then runs a few tokens that
nobody looks at. They do so whenever they run the teacher: before the schedule, and inside it on the
last stage, where all ranks come to the same window of micro-batches in the same order.

What an expert multiplies at once are the tokens of one pass of each rank. So that a run which is
resumed does the same, which passes go together must follow from the samples alone, and not from
what was measured (``pipeline``).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_moe_inject.host.agreement import of_each_rank
from megatron_moe_inject.host.errors import RecipeError, fail
from megatron_moe_inject.recipe.schema import Recipe, TeacherSpec
from megatron_moe_inject.teachers.base import TeacherInfo


@dataclass(frozen=True)
class ExpertRanks:
    """The ranks that hold one teacher's experts together.

    Attributes:
        group: between their devices.
        host: the same ranks over gloo.
    """

    group: dist.ProcessGroup
    host: dist.ProcessGroup

    def most(self, passes: int) -> int:
        """The largest number of passes that any of them is to run.

        Collectives: one all-reduce of an int64 over ``host``; no wait for a device.
        """
        number = torch.tensor(passes)
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self.host)
        return int(number)

    def agree_loaded(self, error: RecipeError | None) -> None:
        """All have loaded their part, before any waits for another in a forward pass.

        Collectives: one all-reduce of an int64 over ``host``.

        Raises:
            RecipeError: ``error``, or on a rank without one that another has one.
        """
        failed = self.most(int(error is not None))
        if error is not None:
            raise error
        if failed:
            raise RecipeError("another rank could not load its part of a teacher's experts")


def check_experts(recipe: Recipe, infos: Mapping[str, TeacherInfo]) -> None:
    """Each ``ep`` must divide the teacher's experts.

    Raises:
        RecipeError: it does not, or the teacher has no experts.
    """
    for name, info in infos.items():
        size, key = recipe.teachers[name].ep, f"teachers.{name}.ep"
        if size == 1:
            continue
        if info.experts is None:
            raise fail(key, size, f"has nothing to divide: {info.source} is dense", "remove it")
        if info.experts.number % size:
            raise fail(
                key, size, f"does not divide the {info.experts.number} experts of {info.source}",
                "write a divisor",
            )  # fmt: skip


def check_ranks(recipe: Recipe, args: Namespace) -> None:
    """Each ``ep`` must divide the ranks of a pipeline stage.

    Args:
        args: Megatron's, of a job whose size is known.

    Raises:
        RecipeError: it does not.
    """
    for name, spec in recipe.teachers.items():
        ranks = args.world_size // args.pipeline_model_parallel_size
        if ranks % spec.ep:
            raise fail(
                f"teachers.{name}.ep", spec.ep,
                f"does not divide the {ranks} ranks of a pipeline stage", "write a divisor",
            )  # fmt: skip


@dataclass(frozen=True)
class ExpertGroups:
    """The groups of this rank, by size."""

    by_size: Mapping[int, ExpertRanks] = field(default_factory=dict)

    def of(self, spec: TeacherSpec) -> ExpertRanks | None:
        """The ranks that hold a teacher's experts together; None where each holds them all."""
        return self.by_size.get(spec.ep)


def expert_groups(holders: Iterable[tuple[int, range]], stage: int) -> ExpertGroups:
    """The groups that this rank is in.

    Args:
        holders: of each teacher the size of its groups and the stages that hold it, the same on
            every rank; a size divides the ranks of a stage.
        stage: of this rank.

    Collectives: where a size is above 1, one all-gather of an int64 over the whole world, and for
    each such size two ``new_group`` for each group.
    """
    stages_by_size: dict[int, set[int]] = {}
    for size, stages in holders:
        if size > 1:
            stages_by_size.setdefault(size, set()).update(stages)
    if not stages_by_size:
        return ExpertGroups()
    numbers = [number for (number,) in of_each_rank([stage])]
    found = {}
    for size, wanted in sorted(stages_by_size.items()):
        members = []
        for number in sorted(wanted):
            ranks = [rank for rank, own in enumerate(numbers) if own == number]
            members += [ranks[first : first + size] for first in range(0, len(ranks), size)]
        group, _ = dist.new_subgroups_by_enumeration(members)
        host, _ = dist.new_subgroups_by_enumeration(members, backend="gloo")
        if stage in wanted:
            assert isinstance(group, dist.ProcessGroup), "this rank is one of the members"
            assert isinstance(host, dist.ProcessGroup), "this rank is one of the members"
            found[size] = ExpertRanks(group, host)
    return ExpertGroups(found)
