"""How long a step takes: operations over a rate, through the pipeline's schedule.

The rate is what a GPU reaches in a whole step, transfers and kernels without products included. It
is given (``--tflops``) or comes from measured steps (``calibrate``). For another model or layout
than the measured one take the range that is told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_moe_inject.planning.job_plan import JobPlan

RANGE = 0.2
"""How far a step may be from what is planned, as a share of it."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what takes them, and what follows.

    Attributes:
        compute: of the pipeline rank that computes longest, waiting aside.
        bubble: what waiting for other stages adds.
        teacher: what the teachers' forward passes add.
        original: what the original model's forward pass adds.
        tokens: of a step.
        gpus: of the job.
        steps: of the whole run; None where it has no end.
    """

    compute: float
    bubble: float
    teacher: float
    original: float
    tokens: int
    gpus: int
    steps: int | None

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.compute + self.bubble + self.teacher + self.original

    @property
    def tokens_per_second(self) -> float:
        """Of the whole job."""
        return self.tokens / self.seconds

    @property
    def gpu_hours(self) -> float | None:
        """Of the whole run, evaluations and saving aside; None where it has no end."""
        return None if self.steps is None else self.steps * self.seconds * self.gpus / 3600


def step_time(plan: JobPlan, tflops: float, steps: int | None) -> StepTime:
    """The time of a step.

    Args:
        tflops: what a GPU reaches, in 10^12 operations a second.
        steps: of the whole run.
    """
    rate, schedule = tflops * 1e12, plan.schedule
    seconds = [
        [(cost.forward_flops / rate, cost.backward_flops / rate) for cost in stage.costs]
        for stage in plan.stages
    ]
    compute = max(schedule.busy(seconds))
    student = schedule.makespan(seconds)
    ready = [teacher.flops / rate for teacher in plan.teachers]
    taught = schedule.makespan(seconds, ready) if any(ready) else student
    forward = max(sum(f for f, _ in chunks) for chunks in seconds)
    general = math.ceil(plan.general_share * schedule.micro_batches)
    original = forward * (general + (schedule.stages - 1) / schedule.chunks) if general else 0.0
    return StepTime(
        compute,
        student - compute,
        taught - student,
        original,
        plan.tokens,
        plan.layout.gpus,
        steps,
    )
