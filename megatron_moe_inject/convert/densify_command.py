"""``moe-inject densify``.

torch is imported when it runs: the other commands do without it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

from megatron_moe_inject.host.commands import (
    Commands,
    add_command,
    cost,
    must_not_exist,
    progress_bar,
)
from megatron_moe_inject.host.text import count, memory_text, ranges

_EXAMPLES = """examples:
  moe-inject densify ckpt/moe --output ckpt/dense --ffn-hidden-size 6144 --profile profile.json
  moe-inject densify ckpt/moe --output ckpt/dense --ffn-hidden-size 6144 --method keep
"""


def add_commands(commands: Commands) -> None:
    """Add the command to ``moe-inject``; ``run`` of the parsed options returns the text."""
    command = add_command(
        commands,
        "densify",
        "write a checkpoint with experts as a dense one, a dense student's start",
        "Write a checkpoint in which every layer of experts is a dense feed-forward: the shared "
        "expert and as many others as fit, side by side, each weighed by its mean gate. It is the "
        "start of a dense student that then learns from the model with experts. No GPU, no process "
        "group; one layer is in memory at a time.",
        _EXAMPLES,
        run=_densify,
    )
    command.add_argument(
        "checkpoint", metavar="CKPT", type=Path, help="a --save directory or an iteration in it"
    )
    command.add_argument("--output", type=Path, required=True, help="a --save directory to write")
    for flag, kind, metavar, default, text in (
        ("ffn-hidden-size", int, "N", None, "neurons of each dense feed-forward"),
        ("profile", str, "FILE", None, "mean gates from a routing profile of the checkpoint "
         "(default: all experts alike)"),
        ("domain", str, "NAMES", None, "classes of the profile that count, as in code,general "
         "(default: all)"),
        ("method", str, "WORD", "concatenate", "concatenate: experts that differ; merge: the same, "
         "averaged with those like them; keep: the highest scores (default concatenate)"),
        ("score", str, "WORD", "output", "output: mean gate times norm of the output; gate: mean "
         "gate; token: share of the tokens (default output)"),
        ("scale", str, "WORD", "expected", "expected: by mean gates; norm: as large as the "
         "experts' output (default expected)"),
        ("shared-gate", float, "MEAN", None, "of the sigmoid that scales a shared expert"),
        ("seed", int, "N", 1234, "of probes and of neurons that give nothing yet (default 1234)"),
    ):  # fmt: skip
        command.add_argument(
            f"--{flag}", type=kind, metavar=metavar, default=default, help=text,
            required=flag == "ffn-hidden-size",
        )  # fmt: skip


def _densify(options: argparse.Namespace) -> str:
    from megatron_moe_inject.convert.densify import Asked, Densifying
    from megatron_moe_inject.host.checkpoint_place import CheckpointPlace

    begin = time.monotonic()
    must_not_exist(options.output)
    domains = (options.domain or "").split(",")
    densifying = Densifying(
        CheckpointPlace("CKPT", options.checkpoint),
        Asked(
            width=options.ffn_hidden_size,
            profile=options.profile,
            domains=[name.strip() for name in domains if name.strip()],
            method=options.method,
            score=options.score,
            scale=options.scale,
            shared_gate=options.shared_gate,
            seed=options.seed,
        ),
    )
    written = densifying.write(options.output, progress_bar)
    stored = densifying.experts
    parts = [f"{densifying.count} of {stored.experts} experts of {stored.width} neurons"]
    if stored.shared_width:
        parts.insert(0, f"the shared expert's {stored.shared_width}")
    if written.filled:
        parts.append(f"{written.filled} that give nothing yet")
    lines = [
        f"{options.output}: layers {ranges(written.layers)} are dense now, of "
        f"{options.ffn_hidden_size} neurons: {', '.join(parts)}",
        f"{count(written.before)} -> {count(written.parameters)} parameters, "
        f"{memory_text(written.bytes)}",
    ]
    if densifying.count:
        least = min(written.kept, key=written.kept.__getitem__)
        lines.append(
            f"these experts have {_mean(written.kept.values()):.0%} of the gates' weight, least in "
            f"layer {least} ({written.kept[least]:.0%})"
        )
    if options.scale == "norm" and densifying.count:
        lines.append(f"their outputs are multiplied by {_mean(written.scaled.values()):.2f} (mean)")
    lines += written.remarks
    lines.append(
        f"pass {' '.join(written.flags)} from now on, without --num-experts and without --moe-*"
    )
    return "\n".join([*lines, cost(begin)])


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)
