"""What a number of a recipe may be: losses and their gradients are computed in float32.

A Python number can be 1e300 or 1e-300, which become inf and 0 in the first step. The bounds leave
room for what a number meets there: the largest weight times the square of the largest temperature,
Megatron's largest loss scale (2^32), a loss of 100 nats and a step of a million tokens multiply to
4e34, and float32 ends at 3e38. No run is known to want more.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from megatron_moe_inject.host.errors import (
    fail,
)
from megatron_moe_inject.recipe.schedule import Weight, points

WEIGHTS = 1e-12, 1e9
"""Of a loss term, or of a teacher among others."""
TEMPERATURES = 1e-4, 1e4
SHARES = 1e-9, 1.0
"""Of data, or of a token's weight."""
MIXTURES = 1e-6, 1 - 1e-6
"""Of a distribution in a mixture, where both shares have logarithms."""


def check_bounds(
    path: str, value: float, bounds: tuple[float, float], besides: Collection[float] = ()
) -> None:
    """Check that a number is within ``bounds``, both allowed, or one of those ``besides``.

    Raises:
        RecipeError: it is not.
    """
    least, most = bounds
    if value in besides or least <= value <= most:
        return
    size = "small" if value < least else "large"
    others = "".join(f"{other:g}, or " for other in besides)
    remedy = f"write {others}a number from {least:g} to {most:.7g}"
    raise fail(path, value, f"is too {size} for a calculation in float32", remedy)


def check_noise(flag: str, noise: float) -> None:
    """Check a share of noise that is added to weights.

    Raises:
        RecipeError: it is negative or not finite.
    """
    if not 0 <= noise < math.inf:
        problem = "is negative" if noise < 0 else "is not finite"
        raise fail(flag, noise, problem, "write a share such as 0.01")


def check_weight_bounds(path: str, weight: Weight | None) -> None:
    """Check a weight that is not negative, at every point of a schedule.

    Raises:
        RecipeError: naming the number's own key.
    """
    for key, value in {} if weight is None else points(path, weight).items():
        check_bounds(key, value, WEIGHTS, besides=(0,))
