"""A job's plan as text: what ranks hold, which do not fit, and how long a step takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moe_inject.host.errors import listing
from megatron_moe_inject.host.text import count, ranges, table
from megatron_moe_inject.planning.job_plan import JobPlan, RankPlan
from megatron_moe_inject.planning.step_time import RANGE, StepTime

GIB = 2**30
_PARTS = (
    *("parameters", "gradients", "optimizer", "originals", "fp8", "teacher"),
    *("activations", "loss", "peak"),
)
_MUCH = 1.5
"""Trained experts on the busiest expert-parallel rank over their mean that are worth a remark."""


@dataclass(frozen=True)
class Memory:
    """What a GPU has, in bytes.

    Attributes:
        total: of the GPU.
        reserve: what the CUDA context, NCCL and the allocator's gaps take.
    """

    total: int
    reserve: int

    @property
    def usable(self) -> int:
        """What tensors may take."""
        return self.total - self.reserve


def too_large(plan: JobPlan, memory: Memory) -> list[RankPlan]:
    """The ranks that do not fit."""
    return [rank for rank in plan.ranks if rank.peak > memory.usable]


def plan_lines(
    plan: JobPlan, memory: Memory, time: StepTime | None, remarks: Sequence[str], rate: str
) -> dict[str, list[str]]:
    """The plan by titles.

    Args:
        time: None where no rate is known.
        remarks: what is estimated.
        rate: where the rate is from.
    """
    ranks = f"ranks ({plan.layout.gpus} GPUs, {plan.layout.text()}; GiB)"
    return {
        "parameters": _parameter_lines(plan),
        ranks: _rank_lines(plan),
        "experts that train": _balance_lines(plan),
        "memory": _memory_lines(plan, memory),
        "step": _time_lines(plan, time, rate),
        "estimated": list(remarks),
    }


def _parameter_lines(plan: JobPlan) -> list[str]:
    from megatron_moe_inject.host.model_parts import COMPONENTS

    rows = [("component", "parameters", "trained")]
    names = [name for name in COMPONENTS if plan.parameters.get(name)]
    rows += [(n, f"{plan.parameters[n]:,}", f"{plan.trained.get(n, 0):,}") for n in names]
    total, trained = sum(plan.parameters.values()), sum(plan.trained.values())
    rows.append(("total", f"{total:,}", f"{trained:,}"))
    return table(rows, right=(1, 2))


def _rank_lines(plan: JobPlan) -> list[str]:
    by_peak = sorted(plan.ranks, key=lambda rank: (-rank.peak, rank.place.rank))
    shown = {"highest": by_peak[0], "median": by_peak[len(by_peak) // 2], "lowest": by_peak[-1]}
    used = [name for name in _PARTS if any(getattr(rank, name) for rank in plan.ranks)]
    rows = [("", "rank", "stage", "EP rank", "trained", *used)]
    for title, rank in shown.items():
        at = rank.place
        sizes = (f"{getattr(rank, name) / GIB:.2f}" for name in used)
        rows.append((title, str(at.rank), str(at.pp), str(at.ep), count(rank.trained), *sizes))
    lines = table(rows, right=range(1, len(rows[0])))
    host = max(rank.on_host for rank in plan.ranks)
    if host:
        lines.append(f"in host memory: originals, up to {host / GIB:.2f} GiB a rank")
    return lines


def _balance_lines(plan: JobPlan) -> list[str]:
    """Where the experts that train are uneven over expert-parallel ranks."""
    if plan.layout.ep == 1:
        return []
    worst: tuple[float, int, list[int]] | None = None
    for pp in range(plan.layout.pp):
        numbers = [0] * plan.layout.ep
        for rank in plan.ranks:
            if rank.place.pp == pp:
                numbers[rank.place.ep] = rank.trained_experts
        mean = sum(numbers) / len(numbers)
        if mean and (worst is None or max(numbers) / mean > worst[0]):
            worst = max(numbers) / mean, pp, numbers
    if worst is None or worst[0] == 1:
        return []
    ratio, pp, numbers = worst
    idle = numbers.count(0)
    most = [ep for ep, number in enumerate(numbers) if number == max(numbers)]
    lines = [
        f"stage {pp}: {max(numbers)} on EP rank {listing([ranges(most)])}, "
        f"{sum(numbers) / len(numbers):.3g} on the mean of {len(numbers)}, none on {idle}; "
        f"{ratio:.3g} times the mean"
    ]
    if ratio > _MUCH:
        lines.append(
            f"to spread a choice from a profile, write ep: {plan.layout.ep} beside its method"
        )
    return lines


def _memory_lines(plan: JobPlan, memory: Memory) -> list[str]:
    total, reserve = memory.total / GIB, memory.reserve / GIB
    there = f"{total:g} GiB a GPU, {reserve:g} kept for CUDA, NCCL and gaps"
    large = too_large(plan, memory)
    worst = plan.worst
    if not large:
        left = (memory.usable - worst.peak) / GIB
        return [there, f"all {len(plan.ranks)} ranks fit; the fullest has {left:.2f} GiB left"]
    stages = sorted({rank.place.pp for rank in large})
    over = (worst.peak - memory.usable) / GIB
    parts = {name: getattr(worst, name) for name in _PARTS[:-1]}
    most = max(parts, key=parts.__getitem__)
    return [
        there,
        f"{len(large)} of {len(plan.ranks)} ranks do not fit (pipeline stages {ranges(stages)}), "
        f"by up to {over:.2f} GiB on rank {worst.place.rank}",
        f"most of it: {most}, {parts[most] / GIB:.2f} GiB",
    ]


def _time_lines(plan: JobPlan, time: StepTime | None, rate: str) -> list[str]:
    flops = sum(
        plan.schedule.micro_batches * (cost.forward_flops + cost.backward_flops)
        for stage in plan.stages
        for cost in stage.costs
    )
    pipelines = plan.layout.dp
    ranks = plan.layout.tp * plan.layout.cp
    flops += sum(teacher.flops for teacher in plan.teachers)
    whole = flops * pipelines * ranks
    lines = [
        f"{whole / 1e15:.4g} PFLOP, {plan.tokens:,} tokens, "
        f"{plan.schedule.micro_batches} micro-batches on each pipeline"
    ]
    if time is None:
        return [*lines, "for its time give --tflops, or measured results to --calibrate"]
    parts = {
        "the student": time.compute,
        "waiting in the pipeline": time.bubble,
        "teachers": time.teacher,
        "the original model": time.original,
    }
    shown = [f"{name} {seconds:.3g}" for name, seconds in parts.items() if seconds]
    low, high = time.seconds * (1 - RANGE), time.seconds * (1 + RANGE)
    lines.append(f"{time.seconds:.3g} s ({low:.3g} to {high:.3g}) {rate}: " + ", ".join(shown))
    per_gpu = time.tokens_per_second / time.gpus
    lines.append(f"{time.tokens_per_second:,.0f} tokens/s, {per_gpu:,.0f} a GPU")
    if time.gpu_hours is not None:
        lines.append(f"{time.gpu_hours:,.4g} GPU hours for {time.steps:,} steps")
    return lines
