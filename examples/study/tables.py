"""From finished runs to the study's table, its aims, and its picture.

Gain is how many bits per byte of the domain's held-out text an arm saves, forgetting how many of
English's it costs, both against the untouched student on the same text. Every seed counts alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path

import arms
from domains import DOMAINS

MOST_TRAINED = 0.25
"""Share of the parameters that the chosen experts of the first aim may train."""
ADAPTED = ((0.25, 0.95), (0.10, 0.90))
"""Of adapters: the share of parameters that may train, and of the full gain that they aim at."""
NEW_GAIN, NEW_FORGETTING = 1.0, 0.5
"""Of as many new experts, in relation to chosen ones."""
OF_FULL_GAIN, TIMES_CE_GAIN, OF_CE_FORGETTING = 0.9, 3.0, 0.1
COLOURS = {
    "all": "#0072b2", "chosen": "#cc79a7", "random": "#8c8c8c", "quarter": "#e69f00",
    "none": "#009e73", "new": "#d55e00",
}  # fmt: skip
FORGOTTEN_LINEAR = 0.02
FORGOTTEN_TICKS = (-0.02, -0.01, 0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
"""The horizontal axis of the picture: up to where it is linear, and its labels."""
NUMBERS = {arm.name: number for number, arm in enumerate(arms.ARMS, 1)}


def outcome(run: Mapping) -> tuple[float, float, int]:
    """(gain, forgetting, step) of a run, at the evaluation that counts for its arm."""
    at = arms.counted(arms.BY_NAME[run["arm"]], run["domain_bits"])
    gain = run["domain_bits"][0] - run["domain_bits"][at]
    return gain, run["general_bits"][at] - run["general_bits"][0], run["iterations"][at]


def summary(runs: list[dict]) -> list[dict]:
    """A row for each domain and arm that has runs, the untouched student and the teacher first.

    Raises:
        ValueError: runs of a domain and seed that were measured on different text, or runs of
            different Python versions, cannot be compared.
    """
    rows: list[dict] = []
    for domain in dict.fromkeys(run["domain"] for run in runs):
        own = [run for run in runs if run["domain"] == domain]
        _check_text(domain, own)
        taught = [run["teacher_bits"] for run in own if run["teacher_bits"] is not None]
        rows.append(
            {
                **{"domain": domain, "arm": arms.UNTOUCHED, "parameters": own[0]["parameters"]},
                **{"domain_bits": own[0]["domain_bits"][0]},
                **{"general_bits": own[0]["general_bits"][0]},
                "teacher_bits": taught[0] if taught else None,
            }
        )
        for arm in arms.ARMS:
            found = [run for run in own if run["arm"] == arm.name]
            if found:
                rows.append({"domain": domain, "arm": arm.name, **_row(found)})
    return rows


def _check_text(domain: str, own: list[dict]) -> None:
    """A seed decides which samples of the held-out text Megatron takes, for all arms alike."""
    texts = {(run["seed"], run["text"]) for run in own}
    pythons = {run["versions"]["python"] for run in own}
    if len(texts) > len({run["seed"] for run in own}) or len(pythons) > 1:
        raise ValueError(
            f"{domain}: the runs were measured on different held-out text (another Python version "
            "cuts other text); give --results another folder"
        )


def _row(found: list[dict]) -> dict:
    gains, forgotten, at = zip(*map(outcome, found), strict=True)
    return {
        "seeds": [run["seed"] for run in found],
        "gain": list(gains),
        "forgotten": list(forgotten),
        "counted_at": list(at),
        "last_gain": [r["domain_bits"][0] - r["domain_bits"][-1] for r in found],
        "last_forgotten": [r["general_bits"][-1] - r["general_bits"][0] for r in found],
        "trained": found[0]["trained"],
        "parameters": found[0]["parameters"],
        "seconds": [r["step_seconds"] * r["steps"] for r in found],
    }


def aims(rows: list[dict]) -> list[dict]:
    """The aims of each domain that has the arms to judge them by: what was asked, reached, met."""
    judged = []
    for domain in dict.fromkeys(row["domain"] for row in rows):
        means = {
            row["arm"]: {**row, **{k: statistics.mean(row[k]) for k in ("gain", "forgotten")}}
            for row in rows
            if row["domain"] == domain and row["arm"] in arms.BY_NAME
        }
        plain = [m for name, m in means.items() if arms.BY_NAME[name].early]
        if arms.FULL_REFERENCE not in means:
            continue
        full = means[arms.FULL_REFERENCE]
        few = [m for name, m in means.items() if _is_candidate(arms.BY_NAME[name], m)]
        if few and plain:
            ours, best = (max(found, key=lambda m: m["gain"]) for found in (few, plain))
            judged += _judged(domain, ours, full, OF_FULL_GAIN, 1.0)
            judged += _judged(domain, ours, best, TIMES_CE_GAIN, OF_CE_FORGETTING)
        for most, least_gain in ADAPTED:
            few = [m for name, m in means.items() if _is_adapted(arms.BY_NAME[name], m, most)]
            if few:
                ours = max(few, key=lambda m: m["gain"])
                judged += _judged(domain, ours, full, least_gain, 1.0)
        ours = [m for name, m in means.items() if _is_grown(arms.BY_NAME[name])]
        for name, chosen in means.items():
            if ours and arms.BY_NAME[name].experts == "quarter":
                best = min(ours, key=lambda m: m["forgotten"] / max(m["gain"], 1e-9))
                judged += _judged(domain, best, chosen, NEW_GAIN, NEW_FORGETTING)
    return judged


def _is_grown(arm: arms.Arm) -> bool:
    return bool(arm.grown) and not arm.adapters


def _judged(
    domain: str, ours: Mapping, other: Mapping, least_gain: float, most_forgotten: float
) -> list[dict]:
    """What an arm gains and forgets beside another, held against what was aimed at."""
    kept = ours["forgotten"] <= most_forgotten * other["forgotten"]
    return [
        {
            **{"domain": domain, "arm": ours["arm"], "beside": other["arm"]},
            **{"what": what, "reached": _ratio(ours[name], other[name])},
            **{"limit": limit, "met": met},
        }
        for what, name, limit, met in (
            (
                *("gain", "gain", f"at least {least_gain:g}"),
                ours["gain"] >= least_gain * other["gain"],
            ),
            ("forgetting", "forgotten", f"at most {most_forgotten:g}", kept),
        )
    ]


def _is_adapted(arm: arms.Arm, row: Mapping, most: float) -> bool:
    return bool(arm.adapters) and row["trained"] <= most * row["parameters"]


def _is_candidate(arm: arms.Arm, row: Mapping) -> bool:
    few = row["trained"] <= MOST_TRAINED * row["parameters"]
    return few and arm.experts in ("chosen", "quarter") and arm.gamma > 0 and not arm.adapters


def _ratio(ours: float, other: float) -> float | None:
    return ours / other if other > 0 else None


def _spread(values: list[float], digits: int = 3) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def markdown(rows: list[dict], judged: list[dict]) -> str:
    """Rows and aims as Markdown."""
    lines = [
        "| domain | arm | seeds | gain, bits per byte | English forgotten | trained | counted at "
        "step | s a run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        title = DOMAINS[row["domain"]].title
        if row["arm"] == arms.UNTOUCHED:
            teacher = row["teacher_bits"]
            lead = "" if teacher is None else f"; the teacher leads by {_lead(row):.3f}"
            cells = [title, f"untouched ({row['domain_bits']:.3f}{lead})"]
            cells += ["", "0", f"0 ({row['general_bits']:.3f})", "0", "", ""]
        else:
            steps = sorted(set(row["counted_at"]))
            cells = [title, row["arm"], str(len(row["seeds"]))]
            cells += [_spread(row["gain"]), _spread(row["forgotten"])]
            cells += [f"{100 * row['trained'] / row['parameters']:.1f} %"]
            cells += [", ".join(map(str, steps)), f"{statistics.mean(row['seconds']):.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    if judged:
        lines += [
            "",
            "| domain | best arm with few experts | beside | ratio of | is | aim | |",
            "|---|---|---|---|---|---|---|",
        ]
    for aim in judged:
        value = "no forgetting there" if aim["reached"] is None else f"{aim['reached']:.2f}"
        cells = [DOMAINS[aim["domain"]].title, *(aim[key] for key in ("arm", "beside", "what"))]
        cells += [value, aim["limit"]]
        lines.append("| " + " | ".join([*cells, "met" if aim["met"] else "missed"]) + " |")
    return "\n".join(lines) + "\n"


def _lead(row: Mapping) -> float:
    return row["domain_bits"] - row["teacher_bits"]


def one_line(run: Mapping) -> str:
    """A finished run, for whoever watches."""
    gain, forgotten, at = outcome(run)
    name = f"{run['domain']}, {run['arm']}, seed {run['seed']}"
    return f"{name}: gain {gain:.3f}, forgotten {forgotten:+.3f} at step {at}"


def draw(rows: list[dict], path: Path) -> None:
    """Gain against forgetting, a panel for each domain, with the range of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    names = list(dict.fromkeys(row["domain"] for row in rows))
    figure, panels = pyplot.subplots(
        1, len(names), figsize=(5.6 * len(names) + 3, 5.2), layout="constrained", squeeze=False
    )
    handles = {}
    for name, panel in zip(names, panels[0], strict=True):
        title = DOMAINS[name].title
        here = [row for row in rows if row["domain"] == name]
        for row in here:
            if row["arm"] in arms.BY_NAME:
                handles[row["arm"]] = _point(panel, row)
            elif row["teacher_bits"] is not None:
                title += f" (the teacher leads by {_lead(row):.2f})"
        panel.set_xscale("symlog", linthresh=FORGOTTEN_LINEAR, linscale=0.6)
        panel.xaxis.set_major_locator(ticker.FixedLocator(FORGOTTEN_TICKS))
        panel.xaxis.set_minor_locator(ticker.NullLocator())
        panel.xaxis.set_major_formatter("{x:g}")
        xlabel = f"English forgotten, bits per byte (logarithmic beyond {FORGOTTEN_LINEAR})"
        panel.set(title=title, xlabel=xlabel)
        panel.set_ylabel("gain on held-out text, bits per byte")
        panel.margins(0.08)
        panel.spines[["top", "right"]].set_visible(False)
    ordered = [arm.name for arm in arms.ARMS if arm.name in handles]
    numbered = [f"{NUMBERS[name]}  {name}" for name in ordered]
    figure.legend([handles[n] for n in ordered], numbered, loc="outside right upper", fontsize=8)
    figure.draw_without_rendering()
    for panel in panels[0]:
        _number(panel)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _point(panel, row: Mapping):
    """The mark of an arm, with its ranges."""
    arm = arms.BY_NAME[row["arm"]]
    x, y = (statistics.mean(row[key]) for key in ("forgotten", "gain"))
    reach = [
        [[value - min(row[key])], [max(row[key]) - value]]
        for key, value in (("forgotten", x), ("gain", y))
    ]
    colour = COLOURS[arm.experts]
    panel.errorbar(
        *(x, y, reach[1], reach[0]),
        fmt="none",
        ecolor=colour,
        elinewidth=0.8,
        alpha=0.45,
        zorder=1,
    )
    face = colour if arm.gamma else "white"
    (mark,) = panel.plot(
        *(x, y, "o"), markersize=6, color=colour, markerfacecolor=face, gid=str(NUMBERS[arm.name])
    )
    return mark


def _number(panel) -> None:
    """Each mark's number beside it, where it is farthest from other marks and numbers."""
    marks = {line.get_gid(): line for line in panel.lines if line.get_gid()}
    at = {n: panel.transData.transform(line.get_xydata()[0]) for n, line in marks.items()}
    taken = list(at.values())
    for number, line in marks.items():
        around = [
            (length * math.cos(turn * math.pi / 8), length * math.sin(turn * math.pi / 8))
            for length in (14, 20)
            for turn in range(16)
        ]

        def room(offset, own=at[number]) -> float:
            place = own + offset
            others = (math.dist(place, other) for other in taken if other is not own)
            return min([*others, 16]) - 0.3 * math.hypot(*offset)

        best = max(around, key=room)
        taken.append(at[number] + best)
        panel.annotate(
            *(number, line.get_xydata()[0]),
            xytext=(best[0] * 72 / panel.figure.dpi, best[1] * 72 / panel.figure.dpi),
            textcoords="offset points",
            color=line.get_color(),
            ha="center",
            va="center",
            fontsize=8,
        )
