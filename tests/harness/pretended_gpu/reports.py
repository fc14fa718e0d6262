"""What the host waited for, as a run prints it and a test reads it."""

from __future__ import annotations

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.harness.pretended_gpu.places import PREFIX, state


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """The waits inside, by line and reason."""
    before, state.waits = state.waits, Counter()
    try:
        yield state.waits
    finally:
        before.update(state.waits)
        state.waits = before


def report_steps(training: Any) -> None:
    """Each rank prints the waits of each training step as it ends."""
    stock = training.train_step
    number = 0

    @functools.wraps(stock)
    def train_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal number
        number += 1
        with counted() as found:
            result = stock(*args, **kwargs)
        print(f"{PREFIX}step {number} {json.dumps(found)}", flush=True)
        return result

    training.train_step = train_step


def steps_of(output: str) -> list[dict[str, int]]:
    """What a run printed of its steps, rank by rank: waits by line and reason."""
    lines = [line for line in output.splitlines() if line.startswith(f"{PREFIX}step ")]
    return [json.loads(line.split(" ", 4)[4]) for line in lines]


def steady_waits(output: str, ranks: int = 1) -> Counter[tuple[str, str]]:
    """Of the last step of each rank, how often which function of which file waited; the most of
    any rank."""
    steps = steps_of(output)
    assert steps, f"no step was reported:\n{output[-2000:]}"
    assert len(steps) % ranks == 0, "every rank ends in its last step"
    per_rank, most = len(steps) // ranks, Counter()
    for rank in range(ranks):
        found: Counter[tuple[str, str]] = Counter()
        for line, times in steps[(rank + 1) * per_rank - 1].items():
            where, function = line.split(" (")[0].split(" ", 1)
            found[where.rpartition(":")[0], function] += times
        most |= found
    return most
