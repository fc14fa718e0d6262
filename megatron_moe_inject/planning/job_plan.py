"""The plan of a job in plain values: read and written without torch or Megatron."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_moe_inject.planning.costs import ChunkCost, TeacherCost
from megatron_moe_inject.planning.layout import Layout, Place
from megatron_moe_inject.planning.schedule import Schedule


@dataclass(frozen=True)
class RankPlan:
    """What one rank holds, in bytes.

    Attributes:
        place: where it stands.
        parameters: values of all parameters, and buffers.
        trained: elements that train.
        trained_experts: experts of its layers that train, each counted once a layer.
        gradients: Megatron's gradient buffers.
        optimizer: float32 values and moments, this rank's shard.
        originals: copies of what trains, where they lie on the device.
        fp8: FP8 copies of what layers multiply by.
        teacher: teachers' parameters and the states that are kept of a step, the original's too.
        activations: the most that micro-batches hold at once, the loss aside.
        loss: what the loss takes of that.
        on_host: bytes of pinned host memory.
    """

    place: Place
    parameters: int
    trained: int
    trained_experts: int
    gradients: int
    optimizer: int
    originals: int
    fp8: int
    teacher: int
    activations: int
    loss: int
    on_host: int = 0

    @property
    def static(self) -> int:
        """What is held between steps."""
        names = ("parameters", "gradients", "optimizer", "originals", "fp8", "teacher")
        return sum(getattr(self, name) for name in names)

    @property
    def peak(self) -> int:
        """The most that is allocated in a step."""
        return self.static + self.activations + self.loss


@dataclass(frozen=True)
class StagePlan:
    """One pipeline rank's stage.

    Attributes:
        layers: 0-based global layers of each chunk.
        costs: of each chunk, on the rank with most experts that train.
    """

    layers: Sequence[Sequence[int]]
    costs: Sequence[ChunkCost]


@dataclass(frozen=True)
class JobPlan:
    """The whole job.

    Attributes:
        parameters: elements of the whole model by component, each once.
        trained: those that train.
        boundary: where backward stops, as of ``experts.train.boundary``.
        schedule: of each pipeline in a step.
        teachers: of the ranks of each stage.
        tokens: of a step.
        general_share: of a step's samples that the original model runs forward.
    """

    layout: Layout
    ranks: Sequence[RankPlan]
    stages: Sequence[StagePlan]
    parameters: Mapping[str, int]
    trained: Mapping[str, int]
    boundary: int
    schedule: Schedule
    teachers: Sequence[TeacherCost]
    general_share: float
    tokens: int

    @property
    def flops_per_gpu(self) -> float:
        """Operations of a step on a rank of the stage that has most of them, teachers included and
        the original model aside."""
        return max(
            self.schedule.micro_batches
            * sum(cost.forward_flops + cost.backward_flops for cost in stage.costs)
            + teacher.flops
            for stage, teacher in zip(self.stages, self.teachers, strict=True)
        )

    @property
    def worst(self) -> RankPlan:
        """The rank with the highest peak."""
        return max(self.ranks, key=lambda rank: rank.peak)


def as_json(plan: JobPlan) -> dict[str, Any]:
    """A plan in plain values, every rank."""
    ranks = []
    for rank in plan.ranks:
        values = asdict(rank)
        ranks.append(values.pop("place") | values | {"peak": rank.peak})
    stages = [
        {"layers": list(map(list, stage.layers)), "costs": [asdict(cost) for cost in stage.costs]}
        for stage in plan.stages
    ]
    return {
        "layout": asdict(plan.layout),
        "parameters": dict(plan.parameters),
        "trained": dict(plan.trained),
        "boundary": plan.boundary,
        "schedule": asdict(plan.schedule),
        "tokens": plan.tokens,
        "general_share": plan.general_share,
        "teachers": [asdict(teacher) for teacher in plan.teachers],
        "stages": stages,
        "ranks": ranks,
    }


def plan_of_json(values: Mapping[str, Any]) -> JobPlan:
    """The plan that ``as_json`` has written."""
    layout = Layout(**values["layout"])
    ranks = []
    for row in values["ranks"]:
        place = Place(**{name: row[name] for name in Place.__dataclass_fields__})
        rest = {n: row[n] for n in RankPlan.__dataclass_fields__ if n != "place"}
        ranks.append(RankPlan(place, **rest))
    stages = [
        StagePlan(stage["layers"], [ChunkCost(**cost) for cost in stage["costs"]])
        for stage in values["stages"]
    ]
    return JobPlan(
        layout,
        ranks,
        stages,
        values["parameters"],
        values["trained"],
        values["boundary"],
        Schedule(**values["schedule"]),
        [TeacherCost(**teacher) for teacher in values["teachers"]],
        values["general_share"],
        values["tokens"],
    )
