"""``moe-inject export-delta`` and ``moe-inject apply-delta``.

torch is imported when one of them runs: the other commands do without it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_moe_inject.host.commands import Commands, add_command, progress_bar
from megatron_moe_inject.host.domain_choice import add_choice, choice_of
from megatron_moe_inject.host.text import (
    memory_text,
    ranges,
    table,
)

if TYPE_CHECKING:
    from megatron_moe_inject.experts.delta.delta import DeltaSummary


def add_commands(commands: Commands) -> None:
    """Add both commands to ``moe-inject``; ``run`` of the parsed options returns the text."""
    export = add_command(
        commands,
        "export-delta",
        "write what training changed, as a folder of that size",
        "Compare a checkpoint with the one that training began from and write the "
        "slices (experts, layers) that differ, with checksums of what the base held there. "
        "Experts that the base has not are written whole, and added where the delta is applied.",
        run=_export,
    )
    export.add_argument("--trained", type=Path, required=True, help="the checkpoint after training")
    apply = add_command(
        commands,
        "apply-delta",
        "write a base checkpoint with a delta applied",
        "Write the base checkpoint with a delta's slices in the place of its own. The "
        "result holds weights and no optimizer state: load it with --finetune.",
        run=_apply,
    )
    apply.add_argument("--delta", type=Path, required=True, help="a folder of export-delta")
    add_choice(apply)
    for command in (export, apply):
        command.add_argument("--base", type=Path, required=True, help="the checkpoint before")
        command.add_argument("--output", type=Path, required=True, help="a folder to write")


def _export(options: argparse.Namespace) -> str:
    from megatron_moe_inject.experts.delta.delta import export_delta
    from megatron_moe_inject.host.checkpoint_place import CheckpointPlace

    base = CheckpointPlace("--base", options.base)
    trained = CheckpointPlace("--trained", options.trained)
    summary = export_delta(base, trained, options.output, progress=progress_bar)
    rows = [("changed tensor", "slices")]
    rows += [(name, str(number)) for name, number in sorted(summary.changed.items())]
    share = 100 * summary.bytes / summary.base_bytes
    size = f"{memory_text(summary.bytes)}, {share:.3g} % of the base's weights"
    lines = [*table(rows, right=(1,)), f"{options.output}: {size}"]
    return "\n".join([*lines, *_new_experts(summary, "apply-delta adds")])


def _apply(options: argparse.Namespace) -> str:
    from megatron_moe_inject.experts.delta.delta import apply_delta
    from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
    from megatron_moe_inject.host.low_rank import rounding_table

    base = CheckpointPlace("--base", options.base)
    choice = choice_of(options)
    summary = apply_delta(base, options.delta, options.output, progress=progress_bar, choice=choice)
    size = memory_text(summary.bytes)
    if not summary.roundings:
        number = sum(summary.changed.values())
        lines = [f"{options.output}: {number} slices ({size}) replaced"]
        return "\n".join([*lines, *_new_experts(summary, "it has")])
    matrices = sum(rounding.matrices for rounding in summary.roundings.values())
    lines = rounding_table(summary.roundings)
    return "\n".join([*lines, f"{options.output}: {matrices} matrices merged ({size})"])


def _new_experts(summary: DeltaSummary, what: str) -> list[str]:
    """What is new, where something is."""
    card = summary.new_experts
    if card is None:
        return []
    return [
        f"{what} {len(card.ids())} new experts in each MoE layer ({ranges(card.ids())} of "
        f"{card.experts}): pass --num-experts {card.experts}; moe-inject remove-experts takes them "
        "out"
    ]
