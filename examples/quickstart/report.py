"""Tells what the injection gained and what it cost: a table, and a picture of the curves.

    python report.py FOLDER        a finished run of quickstart.sh

The numbers come from what Megatron printed (losses per token, held-out text whole) and the sizes in
the corpora's manifest; what trained is counted by comparing the checkpoints before and after.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import figures

SETS = {"code": "code (domain)", "english": "English (general)"}
STAGES = {"before": "student before", "after": "student after", "teacher": "teacher"}
COLOURS = {"before": "#8c8c8c", "after": "#cc79a7", "teacher": "#e69f00"}


@dataclass(frozen=True)
class Changes:
    """How many parameters a checkpoint holds that another lacks, or that differ bit for bit."""

    changed: int
    total: int
    tensors: tuple[str, ...]


def read_weights(folder: Path) -> dict:
    """All model tensors of the latest iteration of a torch_dist checkpoint, by stored name."""
    import torch
    from torch.distributed import checkpoint

    iteration = int((folder / "latest_checkpointed_iteration.txt").read_text())
    reader = checkpoint.FileSystemReader(str(folder / f"iter_{iteration:07d}"))
    stored = reader.read_metadata().state_dict_metadata
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if hasattr(entry, "size") and not name.startswith(("optimizer", "chained_", "rng_state"))
    }
    checkpoint.load(weights, storage_reader=reader, no_dist=True)
    return weights


def compare(before: dict, after: dict) -> Changes:
    """Counts elements that differ, and those of adapters, which stand beside the weights.

    ValueError if the checkpoints hold different tensors otherwise.
    """
    added = {name: value.numel() for name, value in after.items() if name not in before}
    if any(".inject_adapter." not in name for name in added) or {
        name: value.shape for name, value in before.items()
    } != {name: value.shape for name, value in after.items() if name not in added}:
        raise ValueError("the checkpoints before and after are not of the same model")
    changed = {name: int((after[name] != value).sum()) for name, value in before.items()} | added
    return Changes(
        sum(changed.values()),
        sum(value.numel() for value in before.values()) + sum(added.values()),
        tuple(name for name, count in changed.items() if count),
    )


def held_out(folder: Path, manifest: dict) -> dict[str, dict[str, float]]:
    """Bits per byte by stage and set."""
    table = {}
    for stage in STAGES:
        losses = figures.read_log(folder / f"{stage}.log").validation
        table[stage] = {
            name: figures.bits_per_byte(
                losses[f"lm loss/{name}"][-1][1], manifest[f"{name}_held_out"]
            )
            for name in SETS
        }
    return table


def print_table(bits: dict[str, dict[str, float]], changes: Changes, frozen: str) -> None:
    """The result as plain text."""
    width = 19
    print("\nbits per byte on held-out text (less is better)")
    print(" " * width + "".join(f"{name:>16s}" for name in STAGES.values()) + "       change")
    for name, title in SETS.items():
        row = "".join(f"{bits[stage][name]:16.3f}" for stage in STAGES)
        print(f"{title:{width}s}{row}{bits['after'][name] - bits['before'][name]:+13.3f}")
    share = 100 * changes.changed / changes.total
    print(f"\ntrained parameters   {changes.changed:,d} of {changes.total:,d} ({share:.0f} %)")
    print(f"frozen parameters    {frozen}")
    gap = bits["before"]["code"] - bits["teacher"]["code"]
    gain = bits["before"]["code"] - bits["after"]["code"]
    if gap > 0:
        print(f"of the teacher's lead on code, {100 * gain / gap:.0f} % went into the student")
    print()


def draw(folder: Path, bits: dict[str, dict[str, float]], manifest: dict, path: Path) -> None:
    """Three panels: loss terms while training, held-out bits per byte, and the result as bars.

    Between the whole evaluations before and after, the curves show evaluations on random windows of
    the same text, which differ by 0.01 to 0.02 from one to the next.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    run = figures.read_log(folder / "inject.log")
    figure, (terms, curve, bars) = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for name, label, colour in (
        ("kd loss/code", "distance to the teacher on code (KL)", "#0072b2"),
        ("lm loss/code", "cross-entropy on code", "#56b4e9"),
        ("lm loss/general", "cross-entropy on English", "#009e73"),
        ("retention loss", "distance to the original on English (KL)", "#d55e00"),
    ):
        series = [point for point in run.terms.get(name, []) if point[1] > 0]
        if series:
            terms.plot(*zip(*series, strict=True), label=label, color=colour, linewidth=1.5)
    terms.set(title="Loss terms while training", xlabel="step", ylabel="nats per token")
    terms.legend(fontsize=8)

    for name, term, colour in (("code", "code", "#0072b2"), ("english", "general", "#009e73")):
        size = manifest[f"{name}_held_out"]
        sampled = run.validation.get(f"lm loss/{term}", [])
        points = [
            (0, bits["before"][name]),
            *((step, figures.bits_per_byte(loss, size)) for step, loss in sampled[:-1]),
            (run.terms["lm loss"][-1][0], bits["after"][name]),
        ]
        curve.plot(*zip(*points, strict=True), marker="o", label=SETS[name], color=colour)
    curve.axhline(
        bits["teacher"]["code"], color=COLOURS["teacher"], linestyle="--", label="teacher on code"
    )
    curve.set(title="Held-out text", xlabel="step", ylabel="bits per byte")
    curve.legend(fontsize=8)

    for offset, (stage, label) in enumerate(STAGES.items()):
        places = [index + (offset - 1) * 0.27 for index in range(len(SETS))]
        drawn = bars.bar(
            places, [bits[stage][name] for name in SETS], 0.25, label=label, color=COLOURS[stage]
        )
        bars.bar_label(drawn, fmt="%.2f", fontsize=8)
    bars.set_xticks(range(len(SETS)), SETS.values())
    bars.set(title="Before, after and teacher", ylabel="bits per byte")
    bars.legend(fontsize=8)
    for panel in (terms, curve, bars):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    folder = Path(sys.argv[1])
    manifest = json.loads((folder / "data" / "manifest.json").read_text())
    bits = held_out(folder, manifest)
    changes = compare(read_weights(folder / "student"), read_weights(folder / "injected"))
    found = re.findall(r"frozen check: (.*)", (folder / "inject.log").read_text(errors="replace"))
    print_table(bits, changes, found[-1] if found else "NOT CHECKED: no such line in inject.log")
    draw(folder, bits, manifest, folder / "curves.png")
    result = {"bits_per_byte": bits, "changed": changes.changed, "parameters": changes.total}
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"picture: {folder / 'curves.png'}")


if __name__ == "__main__":
    main()
