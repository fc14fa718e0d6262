"""Lines of a run's list."""

from megatron_moe_inject.evaluation.report.run_file import (
    Component,
    Start,
    Step,
)


def start(iteration=0, **changed) -> Start:
    fields = {
        "time": "2026-11-22T07:00:00+00:00",
        "recipe": "domains: [{name: code, data: [1]}]\nobjective: {alpha: 0, beta: 1}\n",
        "plan": "moe-inject plan\n\ndomains\n  code",
        "versions": {"torch": "2.15", "megatron-core": "0.19.2"},
        "parameters": [Component("experts", 1000, 3000), Component("router", 0, 64)],
        "world_size": 2,
        "evaluations": "/nowhere/inject_evaluation.jsonl",
        "train_iters": 8,
    }
    return Start(iteration=iteration, **fields | changed)


def step(iteration, terms=None, **changed) -> Step:
    fields = {"samples": 8 * iteration, "steps": 1, "skipped": 0, "seconds": 0.25}
    fields |= {"terms": terms or {"lm loss": 4.0 - iteration / 10}, "grad_norm": 1.5}
    return Step(iteration=iteration, **fields | changed)
