"""``moe-inject merge-adapters``.

torch is imported when it runs: the other commands do without it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moe_inject.host.commands import Commands, add_command
from megatron_moe_inject.host.text import table

if TYPE_CHECKING:
    from megatron_moe_inject.host.low_rank import Rounding


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

    trained = CheckpointPlace("--trained", options.trained)
    done = merge_adapters(trained, options.output, _progress)
    number = sum(rounding.matrices for rounding in done.roundings.values())
    return "\n".join(
        [
            *_rounding_table(done.roundings),
            f"{options.output}: adapters merged into {number} matrices, without optimizer state",
        ]
    )


def _rounding_table(roundings: Mapping[str, Rounding]) -> list[str]:
    """The largest error of a matrix relative to its largest change, the root mean square of all
    relative to that of all changes, and how many values stayed as they were."""
    rows = [("merged", "matrices", "largest rounding", "rms", "values not moved")]
    for component, rounding in sorted(roundings.items()):
        lost = rounding.lost / rounding.values if rounding.values else 0.0
        numbers = (_share(rounding.largest), _share(rounding.rms), _share(lost))
        rows.append((component, str(rounding.matrices), *numbers))
    return [*table(rows, right=(1, 2, 3, 4)), "rounding is relative to the change, s B A"]


def _share(value: float) -> str:
    return f"{value:.2g}" if value else "none"


def _progress(items: Iterable[Any], total: int) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(items, total=total, disable=None, leave=False)
