"""Writes a dense checkpoint again with feed-forwards drawn at random, as Megatron begins them.

    python drawn.py DENSE OUTPUT

What is left is the teacher's attention and embedding: beside the whole start it tells what the
experts' neurons are worth.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.torch_dist_copy import rewritten_copy

FIRST, SECOND = (f"decoder.layers.mlp.linear_fc{number}.weight" for number in (1, 2))
DEVIATION = 0.02
LATEST = "latest_checkpointed_iteration.txt"


def write(dense: Path, output: Path) -> None:
    """A ``--save`` directory like ``dense``, which has its layers stacked."""
    checkpoint = CheckpointPlace("DENSE", dense).open()
    generator = torch.Generator().manual_seed(1234)

    def drawn(deviation: float) -> Callable[[tuple[int, ...], torch.Tensor], bool]:
        def change(begin: tuple[int, ...], part: torch.Tensor) -> bool:
            part.copy_(deviation * torch.randn(part.shape, generator=generator))
            return True

        return change

    second = DEVIATION / math.sqrt(2 * checkpoint.args.num_layers)
    changes = {FIRST: drawn(DEVIATION), SECOND: drawn(second)}
    output.mkdir()
    rewritten_copy(checkpoint, output / checkpoint.folder.name, changes, lambda parts, count: parts)
    (output / LATEST).write_text((dense / LATEST).read_text())


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
