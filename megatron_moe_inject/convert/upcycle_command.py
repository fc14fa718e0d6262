"""``moe-inject upcycle``.

torch is imported when it runs: the other commands do without it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron_moe_inject.host.commands import (
    Commands,
    add_command,
    cost,
    must_not_exist,
    progress_bar,
)
from megatron_moe_inject.host.text import count, memory_text, ranges
from megatron_moe_inject.recipe.layer_list import parse_layers

_EXAMPLES = """examples:
  moe-inject upcycle ckpt/dense --output ckpt/moe --experts 8
  moe-inject upcycle ckpt/dense --output ckpt/moe --experts 32 --granularity 4 --topk 8
"""


def add_commands(commands: Commands) -> None:
    """Add the command to ``moe-inject``; ``run`` of the parsed options returns the text."""
    command = add_command(
        commands,
        "upcycle",
        "write a dense checkpoint as a mixture of experts that computes the same",
        "Write a checkpoint in which every feed-forward of a dense GPT model is a layer of experts "
        "that begin as copies of it, or as parts of copies. As long as the gates of a token sum to "
        "1 the model computes what it did. No GPU, no process group; one matrix is in memory at a "
        "time.",
        _EXAMPLES,
        run=_upcycle,
    )
    command.add_argument(
        "checkpoint", metavar="CKPT", type=Path, help="a --save directory or an iteration in it"
    )
    command.add_argument("--output", type=Path, required=True, help="a --save directory to write")
    for flag, kind, metavar, default, text in (
        ("experts", int, "E", None, "experts of a layer"),
        ("topk", int, "K", None, "experts of a token (default: those of two copies)"),
        ("granularity", int, "G", 1, "cut each copy into G experts of a G-th of its width "
         "(default 1)"),
        ("layers", str, "RANGES", None, "layers that get experts, as in 1-31 (default: all)"),
        ("noise", float, "SHARE", 0.0, "add so many standard deviations to each expert's matrices "
         "(default 0: the function is exact)"),
        ("seed", int, "N", 1234, "of the router's rows, and of noise (default 1234)"),
    ):  # fmt: skip
        command.add_argument(
            f"--{flag}", type=kind, metavar=metavar, default=default, help=text,
            required=flag == "experts",
        )  # fmt: skip


def _upcycle(options: argparse.Namespace) -> str:
    from megatron_moe_inject.convert.upcycle import Asked, Upcycling
    from megatron_moe_inject.host.checkpoint_place import CheckpointPlace

    begin = time.monotonic()
    must_not_exist(options.output)
    upcycling = Upcycling(
        CheckpointPlace("CKPT", options.checkpoint),
        Asked(
            experts=options.experts,
            topk=options.topk,
            granularity=options.granularity,
            layers=None if options.layers is None else parse_layers(options.layers),
            noise=options.noise,
            seed=options.seed,
        ),
    )
    written = upcycling.write(options.output, progress_bar)
    lines = [
        f"{options.output}: {options.experts} experts in layers {ranges(written.layers)}, "
        f"{count(written.dense)} -> {count(written.parameters)} parameters, of which a token uses "
        f"{count(written.active)}; {memory_text(written.bytes)}, as copies are stored once",
        f"pass {' '.join(written.flags)} from now on",
    ]
    if options.noise:
        lines.append("noise: the function is no longer exact; measure it by moe-inject evaluate")
    return "\n".join([*lines, cost(begin)])
