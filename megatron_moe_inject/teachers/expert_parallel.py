"""Expert parallelism of teachers that are mixtures of experts, apart from the student's.

A teacher with ``ep: n`` has its experts in n parts, one on each of n ranks of the last pipeline
stage, whatever the student's own layout is: ranks of one stage, in their order, form groups of n.
Everything else of the teacher is whole on each. Tokens travel to their experts and back inside its
forward pass, so that all ranks of a group must run as many passes. Each has its own samples: before
they begin they agree over gloo on the most, and who has fewer then runs a few tokens that nobody
looks at.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_moe_inject.host.agreement import of_each_rank
from megatron_moe_inject.host.errors import RecipeError, fail
from megatron_moe_inject.recipe.schema import Recipe
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


def expert_ranks(sizes: Iterable[int], stage: int, stages: int) -> dict[int, ExpertRanks]:
    """The groups of this rank by size, of the last stage; empty elsewhere, and of size 1.

    Args:
        sizes: of the teachers' groups, the same on every rank; each divides the ranks of a stage.
        stage: of this rank.
        stages: of the pipeline.

    Collectives: where a size is above 1, one all-gather of an int64 over the whole world, and for
    each such size two ``new_group`` for each group.
    """
    wanted = sorted(set(sizes) - {1})
    if not wanted:
        return {}
    numbers = of_each_rank([stage])
    last = [rank for rank, (number,) in enumerate(numbers) if number == stages - 1]
    found = {}
    for size in wanted:
        members = [last[first : first + size] for first in range(0, len(last), size)]
        group, _ = dist.new_subgroups_by_enumeration(members)
        host, _ = dist.new_subgroups_by_enumeration(members, backend="gloo")
        if stage == stages - 1:
            assert isinstance(group, dist.ProcessGroup), "this rank is one of the members"
            assert isinstance(host, dist.ProcessGroup), "this rank is one of the members"
            found[size] = ExpertRanks(group, host)
    return found
