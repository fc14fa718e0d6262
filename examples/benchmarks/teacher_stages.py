"""A step's teacher on the last pipeline stage alone, and shared by all stages.

    python examples/benchmarks/teacher_stages.py [--stages 2] [--micro-batches 16] [--steps 8]
    python examples/benchmarks/teacher_stages.py --simulate [--stages 16]

The first is one run of real Megatron on the CPU lane. All stages hold the teacher; steps take turns
between all passes on the last stage, even shares, and shares by the measured ratio, so that noise
of the machine hits all alike. Prints by stage the sequences and the CPU time of the teacher before
the schedule, and a step's wall time, which takes a quiet machine with a core for each stage. The
second needs no Megatron: a 1F1B schedule of a model with the costs of DeepSeek-V3 at 4,096 tokens
and a 7B teacher, with the shares that ``teachers.spread`` gives.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from step_overhead import model_flags, train

from megatron_moe_inject.teachers.spread import UNKNOWN, sequences_by_stage

ALL_ON_THE_LAST = 1e-6
"""A ratio by which the last stage would be done in no time."""
WARM_UP = 6
RECIPE = """
domains:
  - {{name: domain, data: [0], teacher: small}}
teachers:
  small: {{source: "megatron:{teacher}", ranks: pipeline}}
objective: {{alpha: 0.7, beta: 0.3}}
train: {{experts: all, router: true, attention: true, norms: true}}
"""
STAGE_FLOP = 1064.9e12 / 3 / 16  # a sequence's forward through one of 16 stages, Megatron's formula
TEACHER_FLOP = 2 * 6.5e9 * 4096 + 32 * 2 * 4096**3  # a sequence through a 7B body, causal
PEAK, STUDENT_MFU, TEACHER_MFU = 989e12, 0.40, 0.50
VARIANTS = ("last stage", "even", "measured")


def one_forward_one_backward(
    stages: int, micro_batches: int, forward: float, backward: float, begin: Sequence[float]
) -> float:
    """When a 1F1B schedule ends whose stages are free from ``begin`` on."""
    orders = []
    for stage in range(stages):
        warm = min(stages - 1 - stage, micro_batches)
        order = [("F", i) for i in range(warm)]
        for i in range(micro_batches - warm):
            order += [("F", warm + i), ("B", i)]
        order += [("B", i) for i in range(micro_batches - warm, micro_batches)]
        orders.append(order)
    ended: dict[tuple[str, int, int], float] = {}
    clock, done = list(begin), [0] * stages
    while any(done[stage] < len(orders[stage]) for stage in range(stages)):
        for stage in range(stages):
            while done[stage] < len(orders[stage]):
                kind, i = orders[stage][done[stage]]
                needed = ("F", stage - 1, i) if kind == "F" else ("B", stage + 1, i)
                if kind == "F" and stage == 0:
                    ready: float | None = 0.0
                elif kind == "B" and stage == stages - 1:
                    ready = ended["F", stage, i]
                else:
                    ready = ended.get(needed)
                if ready is None:
                    break
                took = forward if kind == "F" else backward
                clock[stage] = ended[kind, stage, i] = max(clock[stage], ready) + took
                done[stage] += 1
    return max(clock)


def simulate(options: argparse.Namespace) -> None:
    """The table of a step's time by where the teacher runs."""
    stages = options.stages
    forward = STAGE_FLOP * 16 / stages / (STUDENT_MFU * PEAK)
    teacher = TEACHER_FLOP / (TEACHER_MFU * PEAK)
    print(
        f"PP {stages}, 1F1B, a stage's forward {1e3 * forward:.0f} ms, a teacher's sequence "
        f"{1e3 * teacher:.0f} ms, nine of ten sequences are the domain's"
    )
    print(
        "| micro-batches | backward | step alone | last stage | even | measured | its sequences |"
    )
    print("|---|---|---|---|---|---|---|")
    for micro_batches in (32, 128):
        count = round(0.9 * micro_batches)
        for word, backward in (("2 forwards", 2 * forward), ("1 forward", forward)):

            def step(parts: Sequence[int], m: int = micro_batches, b: float = backward) -> float:
                begin = [part * teacher for part in parts]
                return one_forward_one_backward(stages, m, forward, b, begin)

            alone = step([0] * stages)
            uneven = sequences_by_stage(count, stages, 4096, teacher / forward)
            shares = (
                [0] * (stages - 1) + [count],
                sequences_by_stage(count, stages, 4096),
                uneven,
            )
            cells = [f"{100 * (step(parts) / alone - 1):+.1f} %" for parts in shares]
            print(
                f"| {micro_batches} | {word} | {alone:.2f} s | {' | '.join(cells)} | "
                f"{' '.join(map(str, uneven))} |"
            )


def parent(options: argparse.Namespace) -> None:
    """Make a teacher, run the timed training, print the table."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        teacher, recipe = f"{folder}/teacher", Path(folder, "recipe.yaml")
        flags = [*model_flags(options, options.teacher_hidden), "--train-iters", "1"]
        flags += ["--save", teacher, "--save-interval", "1"]
        module = "-m megatron_moe_inject.pretrain"
        train(1, *flags, module=module, environment=environment)
        recipe.write_text(RECIPE.format(teacher=teacher))
        steps = len(VARIANTS) * options.steps + WARM_UP
        moe = "--num-experts 8 --moe-router-topk 2 --moe-token-dispatcher-type alltoall "
        moe += f"--moe-ffn-hidden-size {options.hidden} --moe-router-load-balancing-type none "
        moe += f"--inject-recipe {recipe} --inject-from-scratch --train-iters {steps} "
        moe += f"--micro-batch-size 1 --global-batch-size {options.micro_batches} "
        moe += f"--pipeline-model-parallel-size {options.stages}"
        times = Path(folder, "times.json")
        environment |= {"TEACHER_STAGES_TIMES": str(times), "TEACHER_STAGES_STEPS": str(steps)}
        own = [*model_flags(options, options.hidden), *moe.split()]
        script = str(Path(__file__).resolve())
        train(options.stages, *own, module=script, environment=environment)
        print_table(json.loads(times.read_text()), options)


def print_table(found: dict, options: argparse.Namespace) -> None:
    """Times by variant, with the sequences of each stage."""
    print(
        f"PP {options.stages}, {options.layers} layers, hidden {options.hidden}, teacher "
        f"{options.teacher_hidden}, vocabulary {options.vocab}, {options.micro_batches} "
        f"micro-batches of 256 tokens, one thread a stage, {options.steps} steps each; "
        f"a teacher's sequence takes {found['ratio']:.2f} forwards of a stage"
    )
    for name in VARIANTS:
        seconds = found["seconds"][name]
        parts = found["sequences"][name]
        sent = sum(parts[:-1]) * 256 * (8 + 4 * options.teacher_hidden) / 2**20
        print(
            f"{name:<12}{1e3 * min(seconds):>8.0f} ms a step at least, median "
            f"{1e3 * statistics.median(seconds):.0f}; sequences {' '.join(map(str, parts))}, CPU "
            f"{' '.join(f'{1e3 * own:.0f}' for own in found['before'][name])} ms, "
            f"{sent:.1f} MiB sent"
        )


def child() -> None:
    """The training run, its steps in turns and timed."""
    from megatron_moe_inject import launch

    launch.prepare()
    import runpy

    import torch.distributed as dist

    from megatron_moe_inject.host.step import Step
    from megatron_moe_inject.step import StepHook
    from megatron_moe_inject.teachers.megatron import MegatronTeacher
    from megatron_moe_inject.teachers.pace import Pace
    from megatron_moe_inject.teachers.step_teachers import StepTeachers

    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    before: dict[str, list[float]] = {name: [] for name in VARIANTS}
    read = dict.fromkeys(VARIANTS, 0)
    turn, steps, measured = "measured", 0, UNKNOWN
    total = int(os.environ["TEACHER_STAGES_STEPS"])
    hook, states, ratio = StepHook.wrap, MegatronTeacher.states, Pace.ratio
    begin = StepTeachers.begin

    def wrap(self: StepHook, forward_backward: Callable) -> Callable:
        injected = hook(self, forward_backward)

        def step(**kwargs):
            nonlocal turn, steps
            number, steps = steps - WARM_UP, steps + 1
            turn = VARIANTS[number % len(VARIANTS)] if number >= 0 else "measured"
            read[turn] = 0
            dist.barrier()
            started = time.perf_counter()
            result = injected(**kwargs)
            dist.barrier()
            if number >= 0:
                seconds[turn].append(time.perf_counter() - started)
            if steps == total:
                tell()
            return result

        return step

    def timed(self: StepTeachers, step: Step) -> None:
        started = time.process_time()
        begin(self, step)
        if steps > WARM_UP:
            before[turn].append(time.process_time() - started)

    def tell() -> None:
        own = {name: (read[name], statistics.median(before[name])) for name in VARIANTS}
        by_rank: list = [None] * dist.get_world_size()
        dist.all_gather_object(by_rank, own)
        if dist.get_rank() == 0:
            found: dict = {"seconds": seconds, "ratio": measured}
            for i, what in enumerate(("sequences", "before")):
                found[what] = {name: [rank[name][i] for rank in by_rank] for name in VARIANTS}
            Path(os.environ["TEACHER_STAGES_TIMES"]).write_text(json.dumps(found))

    def counted(self, tokens, *args, **kwargs):
        read[turn] += len(tokens)
        return states(self, tokens, *args, **kwargs)

    def own_ratio(self: Pace, name: str) -> float:
        nonlocal measured
        measured = ratio(self, name)
        return {"last stage": ALL_ON_THE_LAST, "even": UNKNOWN}.get(turn, measured)

    StepHook.wrap, MegatronTeacher.states, Pace.ratio = wrap, counted, own_ratio
    StepTeachers.begin = timed
    runpy.run_module("megatron_moe_inject.pretrain", run_name="__main__", alter_sys=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--stages", type=int)
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--teacher-hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    options = parser.parse_args()
    options.stages = options.stages or (16 if options.simulate else 2)
    (simulate if options.simulate else parent)(options)


if __name__ == "__main__":
    if "TEACHER_STAGES_TIMES" in os.environ:
        child()
    else:
        main()
