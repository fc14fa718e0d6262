"""``moe-inject add-experts`` and ``moe-inject remove-experts``.

torch is imported when one of them runs: the other commands do without it.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moe_inject.host.commands import (
    Commands,
    add_command,
    cost,
    must_not_exist,
    progress_bar,
)
from megatron_moe_inject.host.errors import RecipeError, fail
from megatron_moe_inject.host.text import count, ranges, table
from megatron_moe_inject.recipe.expert_choice import SCORES
from megatron_moe_inject.recipe.layer_list import parse_layers

if TYPE_CHECKING:
    from megatron_moe_inject.experts.grow.add import Added
    from megatron_moe_inject.host.new_experts import NewExperts

Comparison = Callable[..., Callable[..., list[str]]]
"""``evaluation.grown.Comparison``, which stands in a room above."""
Teachers = Mapping[str, Callable[[str, Path], Any]]
"""See ``feed_forwards.opened``; these stand in rooms above."""
_ADD_EXAMPLES = """examples:
  moe-inject add-experts ckpt/student --output ckpt/grown --per-layer 2 --domain code \\
      --profile profiles/code.json
  moe-inject add-experts ckpt/student --output ckpt/grown --per-layer 8 --ep 8 --unmeasured
  moe-inject add-experts ckpt/student --output ckpt/grown --per-layer 2 --check -- <flags of the
      training command>
"""
_REMOVE_EXAMPLES = """examples:
  moe-inject remove-experts ckpt/injected --output ckpt/without
  moe-inject export-delta --base ckpt/student --trained ckpt/without --output what-else-changed
"""
_ROWS = ("closed", "mean", "donor")


def add_commands(commands: Commands, comparison: Comparison, teachers: Teachers) -> None:
    """Add both commands to ``moe-inject``; ``run`` of the parsed options returns the text.

    Args:
        comparison: what ``--check`` measures.
        teachers: further kinds of dense teachers for ``--weights``.
    """
    add = add_command(
        commands,
        "add-experts",
        "give a trained MoE new experts, its function as it was",
        "Write a checkpoint with new experts in every MoE layer. What it computes stays as it was: "
        "new experts are closed by the router's bias where it has one, and else have the mean of "
        "the layer's rows, which is chosen rarely; how rarely is measured on the router logits of "
        "a profile, or by --check, and nothing is written unmeasured but with --unmeasured. No "
        "GPU, no process group; memory is bounded by one expert.",
        _ADD_EXAMPLES,
        run=_add,
        takes_flags=True,
        comparison=comparison,
        teachers=teachers,
    )
    add.usage = "%(prog)s [-h] --output DIR --per-layer N [...] CKPT [-- MEGATRON FLAGS]"
    _checkpoint(add)
    for flag, kind, metavar, text in (
        ("layers", str, "RANGES", "layers whose new experts are to be trained, as in 12-23,26; the "
         "others get some that are not, as all layers have the same number (default: all)"),
        ("profile", str, "FILE", "a routing profile of the checkpoint: copies are of the domain's "
         "most used experts; with router logits it tells how often new experts are chosen"),
        ("donors", str, "IDS", "experts to copy from instead: 1,3 in every layer, or 0:1,3;1:2,5"),
        ("noise", float, "SHARE", "add so many standard deviations to the new weights (default 0, "
         "or 0.01 where two new experts of a layer would be the same)"),
        ("seed", int, "N", "of random numbers (default 1234)"),
        ("ep", int, "SIZE", "expert-parallel ranks of the training to come (default: those that "
         "the checkpoint was saved at)"),
        ("most-chosen", float, "SHARE", "refuse if new experts get more of a layer's choices "
         "(default 0.01)"),
        ("most-loss", float, "NATS", "with --check: refuse if the loss moves by more (default "
         "0.001)"),
    ):  # fmt: skip
        add.add_argument(f"--{flag}", type=kind, metavar=metavar, help=text)
    add.add_argument(
        "--per-layer", type=int, metavar="N", required=True, help="new experts of each layer"
    )
    add.add_argument(
        "--domain", metavar="NAME", action="append", default=[],
        help="class of the profile that they are for; several share them in turns",
    )  # fmt: skip
    add.add_argument(
        "--weights", metavar="WORD",
        help="how they begin: copy of donors (default with --domain and --profile, or --donors), "
        "mean of the layer's experts (else), random, or teacher:megatron:DIR or teacher:hf:DIR: "
        "neurons of a dense model's feed-forwards",
    )  # fmt: skip
    add.add_argument(
        "--teacher-layers", metavar="LIST",
        help="with a teacher: its feed-forward for each layer that gets new experts, from 0, as in "
        "5,11,17 (default: those at the same depth)",
    )  # fmt: skip
    add.add_argument(
        "--rows", choices=_ROWS,
        help="how the router's rows begin: closed by its bias (default where it has one), the mean "
        "of the layer's rows (else), or the donor's, which changes the function",
    )  # fmt: skip
    add.add_argument(
        "--score", choices=SCORES, default="token", help="what donors are ranked by (token)"
    )
    add.add_argument("--no-optimizer", action="store_true", help="leave the optimizer's state out")
    add.add_argument(
        "--check", action="store_true",
        help="run both models on the validation data of the flags behind --, on CPUs: how often "
        "new experts are chosen, and by how much the loss moves",
    )  # fmt: skip
    add.add_argument(
        "--unmeasured", action="store_true",
        help="write it though nobody knows by how much the model's function moves",
    )  # fmt: skip
    remove = add_command(
        commands,
        "remove-experts",
        "take new experts out of a checkpoint again",
        "Write a checkpoint without the experts that add-experts gave it. What did not train is "
        "bitwise what it was. It holds weights and no optimizer state: load it with --finetune.",
        _REMOVE_EXAMPLES,
        run=_remove,
    )
    _checkpoint(remove)
    remove.add_argument(
        "--card", type=Path, metavar="CKPT",
        help="what add-experts wrote, if a run without the plugin saved CKPT",
    )  # fmt: skip


def _checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "checkpoint", metavar="CKPT", type=Path, help="a --save directory or an iteration in it"
    )
    command.add_argument("--output", type=Path, required=True, help="a --save directory to write")


def _add(options: argparse.Namespace) -> str:
    from megatron_moe_inject.experts.grow.add import Addition, Asked
    from megatron_moe_inject.experts.grow.bounds import (
        Bounds,
        check_measured,
        chosen_lines,
        chosen_share,
    )
    from megatron_moe_inject.host.checkpoint_place import CheckpointPlace

    begin = time.monotonic()
    bounds = Bounds.of(options)
    if options.flags and not options.check:
        raise RecipeError("add-experts: training flags are for --check; add it, or leave them out")
    if options.unmeasured and options.check:
        raise RecipeError("--unmeasured: --check measures it; leave one of both out")
    must_not_exist(options.output)
    addition = Addition(
        CheckpointPlace("CKPT", options.checkpoint),
        Asked(
            per_layer=options.per_layer,
            layers=None if options.layers is None else parse_layers(options.layers),
            domains=options.domain,
            profile=options.profile,
            score=options.score,
            donors=options.donors,
            weights=options.weights,
            teacher_layers=_numbers(options.teacher_layers, "--teacher-layers"),
            rows=options.rows,
            noise=options.noise,
            seed=1234 if options.seed is None else options.seed,
            ep=options.ep,
            optimizer=not options.no_optimizer,
        ),
        options.teachers,
    )
    shares = chosen_share(addition)
    if not (options.check or options.unmeasured):
        check_measured(addition, shares)
    measured = chosen_lines(addition, shares, bounds, checked=options.check)
    comparison = options.comparison(addition, options.flags, bounds) if options.check else None
    checked: list[str] = []

    def check(folder: Path, card: NewExperts) -> None:
        if comparison is not None:
            checked.extend(comparison(folder, card))

    added = addition.write(options.output, progress_bar, check)
    return "\n".join(
        [*_summary(added, options.output), *measured, *checked, *added.remarks, cost(begin)]
    )


def _numbers(text: str | None, flag: str) -> list[int] | None:
    """``5,11,17`` as numbers, ``None`` as it is."""
    if text is None:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise fail(flag, text, "is no list of numbers", "write some such as 5,11,17")
    return [int(part) for part in text.split(",")]


def _summary(added: Added, output: Path) -> list[str]:
    card = added.card
    moved = sum(now != old for old, now in enumerate(card.moved))
    rows = [("layer", "new experts", "copied from")]
    rows += [
        (str(layer), ranges(ids), ", ".join(map(str, card.donors.get(layer, []))) or card.weights)
        for layer, ids in card.new.items()
    ]
    lines = [
        f"{output}: {card.base_experts} -> {card.experts} experts in each MoE layer, "
        f"{count(added.parameters)} new parameters",
        f"pass --num-experts {card.experts} from now on",
        "",
        *table(rows),
        "",
    ]
    if moved:
        lines.append(
            f"{moved} old experts have new ids, as each group of the router got its own: write "
            "numbering: old in a recipe that names old ids"
        )
    for domain, ids in card.domains.items():
        lines.append(f"for {domain}: {ranges(ids)} (experts: {{new: {domain}}} in a recipe)")
    if card.filled:
        lines.append(
            f"layers {ranges(card.filled)} got as many, which a recipe does not name: all layers "
            "of a Megatron model have the same number"
        )
    closed = "no token can choose one until its bias moves" if added.exact else ""
    lines.append(f"rows: {card.rows}{f', {closed}' if closed else ''}")
    return lines


def _remove(options: argparse.Namespace) -> str:
    from megatron_moe_inject.experts.grow.remove import remove_experts
    from megatron_moe_inject.host.checkpoint_place import CheckpointPlace

    begin = time.monotonic()
    must_not_exist(options.output)
    card_of = None if options.card is None else CheckpointPlace("--card", options.card)
    removed = remove_experts(
        CheckpointPlace("CKPT", options.checkpoint),
        options.output,
        card_of=card_of,
        progress=progress_bar,
    )
    card = removed.card
    return "\n".join(
        [
            f"{options.output}: {card.experts} -> {card.base_experts} experts in each MoE layer, "
            f"without {ranges(card.ids())}",
            f"they had been added to {card.base} (sha256 {card.base_sha256[:12]})",
            cost(begin),
        ]
    )
