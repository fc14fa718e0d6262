"""Lists of layers on the command line."""

from __future__ import annotations

import re

from megatron_moe_inject.host.errors import RecipeError, show


def parse_layers(text: str) -> list[int]:
    """``12-14,20`` as ``[12, 13, 14, 20]``.

    Raises:
        RecipeError: a part that is no number and no range.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,5})(?:-([0-9]{1,5}))?\s*", part)
        run = [] if match is None else range(int(match[1]), int(match[2] or match[1]) + 1)
        if not run:
            raise RecipeError(f"--layers: {show(text)} is no list of layers; write 12-23,26")
        layers += run
    return layers
