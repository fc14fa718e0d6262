"""What ``freeze_bench.py`` measured: limits by arithmetic, the table, the verdict on the aims."""

from __future__ import annotations

import statistics
from typing import Any

MIB = 2**20
AIMS = {"every-layer": 0.75, "last-quarter": 0.5}
"""Step time as a share of training everything."""


def multiplications(sizes: dict[str, int]) -> dict[str, float]:
    """Multiply-adds per token of one layer's parts, and of the head, in one forward pass."""
    h = sizes["hidden"]
    return {
        "projections": 4 * h * h,
        "attention": 2 * h * sizes["seq"],
        "experts": 3 * h * sizes["ffn"] * sizes["topk"],
        "router": h * sizes["experts"],
        "head": h * sizes["vocab"],
    }


def limits(sizes: dict[str, int], recompute: bool = False) -> dict[str, float]:
    """Least arithmetic of a step, as a share of training everything, by what trains.

    A layer's chosen experts get their share of the tokens. The first layer with chosen experts
    needs their gradients alone; above it everything passes gradients on, and attention's two
    products are of activations, so their backward always takes two. Under full recompute layers
    that run a backward run a second forward, and the first of them passes gradients on as well.
    Norms, softmax, dispatch and the optimizer are not counted.
    """
    part = multiplications(sizes)
    layer = part["projections"] + part["attention"] + part["experts"] + part["router"]
    forward = sizes["layers"] * layer + part["head"]
    of_chosen = part["experts"] * sizes["chosen"] / sizes["experts"]
    passing = layer + part["attention"] + of_chosen
    first = of_chosen * 4 / 3
    found = {}
    for trains, count in (("every-layer", sizes["layers"]), ("last-quarter", sizes["layers"] // 4)):
        backward = part["head"] + (count - 1) * passing + first
        full = 3 * forward
        if recompute:
            backward = part["head"] + count * (passing + layer)
            full += sizes["layers"] * layer
        found[trains] = (forward + backward) / full
    return found


def render(result: dict[str, Any]) -> list[str]:
    """The table, with what was aimed at."""
    sizes = result["sizes"]
    tokens = sizes["global-batch"] * sizes["seq"]
    part = multiplications(sizes)
    forward = sizes["layers"] * (sum(part.values()) - part["head"]) + part["head"]
    shares = ", ".join(
        f"{name} {(1 if name == 'head' else sizes['layers']) * value / forward:.0%}"
        for name, value in part.items()
    )
    lines = [
        f"{result['date']}, {result['machine']}",
        result["command"],
        ", ".join(f"{name} {size}" for name, size in sizes.items()) + f"; {tokens} tokens a step",
        f"multiplications of a forward pass: {shares}",
        "",
        f"{'layout':<17}{'arm':<30}{'step s':>8}{'CPU s':>8}{'time':>7}{'CPU':>7}{'limit':>7}"
        f"{'aim':>6}{'peak MiB':>10}{'grad MiB':>10}{'opt MiB':>9}{'trained':>9}"
        f"{'grad':>8}{'opt':>8}",
    ]
    for row in result["rows"]:
        start = f"{row['layout']:<17}{row['title']:<30}"
        if "ended" in row:
            lines.append(f"{start}  {row['ended']}")
            continue
        limit = limits(sizes, recompute=row["layout"].endswith("recompute"))
        lines.append(start + _numbers(row, _full(result, row["layout"]), limit))
    return [
        *lines,
        "",
        "step s, CPU s (of all ranks): medians. time, CPU, trained (parameters), grad, opt: shares",
        "of the plugin training everything. limit: by multiplications. peak: of one rank, beyond",
        "the bare model.",
    ]


def _full(result: dict[str, Any], layout: str) -> dict[str, Any] | None:
    for row in result["rows"]:
        if row["layout"] == layout and row["arm"] == "all" and "ended" not in row:
            return row
    return None


def _numbers(row: dict[str, Any], full: dict[str, Any] | None, limit: dict[str, float]) -> str:
    trains = row["arm"].removeprefix("stock-")
    seconds, cpu = statistics.median(row["seconds"]), statistics.median(row["cpu_seconds"])
    text = f"{seconds:>8.3f}{cpu:>8.3f}"
    if full is None:
        text += f"{'-':>7}{'-':>7}"
    else:
        text += f"{seconds / statistics.median(full['seconds']):>7.3f}"
        text += f"{cpu / statistics.median(full['cpu_seconds']):>7.3f}"
    text += f"{limit[trains]:>7.3f}" if trains in limit else f"{'-':>7}"
    text += f"{AIMS[trains]:>6.2f}" if trains in AIMS else f"{'-':>6}"
    text += f"{row['peak_bytes'] / MIB:>10,.0f}{row['gradient_bytes'] / MIB:>10,.1f}"
    text += f"{row['optimizer_bytes'] / MIB:>9,.1f}"
    for key in ("trained", "gradient_bytes", "optimizer_bytes"):
        share = "-" if full is None else f"{row[key] / full[key]:.4f}"
        text += f"{share:>9}" if key == "trained" else f"{share:>8}"
    return text
