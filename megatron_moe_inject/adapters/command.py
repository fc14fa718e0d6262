"""``moe-inject merge-adapters``.

torch is imported when it runs: the other commands do without it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_moe_inject.host.commands import Commands, add_command


def add_commands(commands: Commands) -> None:
    """Add the commands to ``moe-inject``; ``run`` of the parsed options returns the text."""
    merge = add_command(
        commands,
        "merge-adapters",
        "write a stock checkpoint with adapters in its weights",
        "Write a checkpoint with adapters and vocabulary rows as one whose weights have them: "
        "W + s B A, rounded once to the type that W is stored in. It holds weights and no "
        "optimizer state: load it with --finetune. Prints what the rounding cost.",
        run=_merge,
    )
    merge.add_argument(
        "--trained", metavar="CKPT", type=Path, required=True, help="the checkpoint with adapters"
    )
    merge.add_argument("--output", type=Path, required=True, help="a --save directory to write")


def _merge(options: argparse.Namespace) -> str:
    from megatron_moe_inject.adapters.merge import merge_adapters
    from megatron_moe_inject.experts.delta.delta import CheckpointPlace
    from megatron_moe_inject.host.low_rank import rounding_table

    trained = CheckpointPlace("--trained", options.trained)
    done = merge_adapters(trained, options.output, _progress)
    number = sum(rounding.matrices for rounding in done.roundings.values())
    return "\n".join(
        [
            *rounding_table(done.roundings),
            f"{options.output}: adapters merged into {number} matrices, without optimizer state",
        ]
    )


def _progress(items: Iterable[Any], total: int) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(items, total=total, disable=None, leave=False)
