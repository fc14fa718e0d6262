"""A weight that changes during training: a number, or points that are joined by lines or cosines.

A value is a function of the iteration alone, the number of optimiser steps taken since the start of
training, which Megatron's checkpoints restore. So a resumed run goes on where it stopped, and
nothing has to be saved.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import ClassVar

SHAPES = ("linear", "cosine")


@dataclass
class Schedule:
    """A value by iteration; before the first point and after the last it stays constant.

    Attributes:
        points: iteration -> value.
        shape: ``linear``, or ``cosine`` for half a cosine wave between neighbours: flat at the
            points, steepest half way.
    """

    NOUN: ClassVar = "a schedule"
    EXAMPLE: ClassVar = "0.5, or {points: {0: 0.0, 500: 0.5}}"

    points: dict[int, float] = field(
        metadata={"remedy": "write iteration: value entries, as in {0: 0.0, 1000: 0.7}"}
    )
    shape: str = field(default="linear", metadata={"choices": SHAPES})

    def at(self, iteration: int) -> float:
        """The value after ``iteration`` optimiser steps."""
        steps = sorted(self.points)
        right = bisect_right(steps, iteration)
        if right in (0, len(steps)):
            return self.points[steps[min(right, len(steps) - 1)]]
        begin, end = steps[right - 1], steps[right]
        way = (iteration - begin) / (end - begin)
        if self.shape == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return self.points[begin] + way * (self.points[end] - self.points[begin])

    def __str__(self) -> str:
        points = ", ".join(f"{step}: {self.points[step]:g}" for step in sorted(self.points))
        return f"{self.shape}({points})"


Weight = float | Schedule
"""What a recipe takes as the weight of a loss term, or as a share of the training data."""


def value_at(weight: Weight, iteration: int) -> float:
    """A weight's value after ``iteration`` optimiser steps."""
    return weight.at(iteration) if isinstance(weight, Schedule) else weight


def ever_positive(weight: Weight) -> bool:
    """Whether the weight is above 0 at some iteration."""
    return highest(weight) > 0


def highest(weight: Weight) -> float:
    """The largest value that the weight ever takes."""
    return max(_values(weight))


def lowest(weight: Weight) -> float:
    """The least value that the weight ever takes."""
    return min(_values(weight))


def rest(share: Weight) -> Weight:
    """What a share leaves of 1, at every iteration."""
    if isinstance(share, Schedule):
        return Schedule({step: 1 - value for step, value in share.points.items()}, share.shape)
    return 1 - share


def points(path: str, weight: Weight) -> dict[str, float]:
    """The numbers that a weight is made of, by their keys; ``path`` is its own."""
    if isinstance(weight, Schedule):
        return {f"{path}.points.{at}": value for at, value in weight.points.items()}
    return {path: weight}


def show_weight(weight: Weight) -> str:
    """For a plan or a report."""
    return str(weight) if isinstance(weight, Schedule) else f"{weight:g}"


def _values(weight: Weight) -> list[float]:
    return list(weight.points.values()) if isinstance(weight, Schedule) else [weight]
