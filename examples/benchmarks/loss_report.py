"""What ``loss_bench.py`` measured: the table, the verdict on the aims, the picture.

Everything works on the dictionary that ``--json`` writes.
"""

from __future__ import annotations

from loss_contenders import CONTENDERS

MIB = 2**20
COLOURS = ("#8c8c8c", "#cc79a7", "#0072b2", "#e69f00", "#f0c060", "#009e73", "#56b4e9", "#d55e00",
           "#000000", "#9b2226", "#6a3d9a", "#b15928", "#003f5c", "#7fb3d5")  # fmt: skip


def mib(count: float | None) -> str:
    return "-" if count is None else f"{count / MIB:,.0f}"


def table(result: dict) -> list[str]:
    """The rows as text, and what each contender computes."""
    lines = [
        f"{'TP':<3}{'head':<9}{'contender':<23}{'value err':>10}{'grad err':>10}{'head err':>10}"
        f"{'ms':>11}{'CPU ms':>11}{'extra MiB':>11}{'- grads':>9}{'GFLOP/s':>10}{'share':>7}"
        f"{'time/naive':>12}"
        f"{'CPU/naive':>11}{'mem/naive':>11}"
    ]
    for row in result["rows"]:
        start = f"{row['tp']:<3}{row['head']:<9}{CONTENDERS[row['contender']].title:<23}"
        if "value_error" in row:
            for key in ("value_error", "gradient_error", "head_gradient_error"):
                start += f"{row[key]:>10.1e}"
        if "seconds" not in row:
            lines.append(f"{start}  {row['status']}")
            continue
        naive = find(result, "naive", row["tp"], row["head"])
        lines.append(
            f"{start}{1e3 * row['seconds']:>11,.1f}{1e3 * row['cpu_seconds']:>11,.1f}"
            f"{mib(row['extra_bytes']):>11}{mib(without_gradients(row)):>9}"
            f"{row['flops_per_second'] / 1e9:>10,.1f}{share(result, row):>7.2f}"
            f"{ratio(row, naive, 'seconds'):>12}{ratio(row, naive, 'cpu_seconds'):>11}"
            f"{ratio(row, naive, 'extra_bytes'):>11}"
        )
    lines += ["", "What each computes (D the divergence, a and b the weights, k ids per token):"]
    names = dict.fromkeys(row["contender"] for row in result["rows"])
    lines += [f"  {CONTENDERS[name].title:<23}{CONTENDERS[name].note}" for name in names]
    lines += [
        "Errors: relative, against whole-logits fp64 at 96 tokens and 1,000 ids.",
        "'- grads': extra MiB without the gradients that were asked for.",
        "GFLOP/s: 2 t v (a h + b h_t) / time; a = 2 (logits, gradient by the hidden states), 3 "
        "with the head's gradient; b = 1, 0 with a stored teacher.",
        f"share: that rate / (ranks x the limit); limit: {limit(result, 1)[1]}.",
    ]
    return lines


def limit(result: dict, tp: int) -> tuple[float, str]:
    """FLOP/s of matrix products that a rank could reach at most, and whose figure it is."""
    peak = result["peak_flops_per_second"]
    if peak:
        return peak, f"{peak / 1e12:,.0f} TFLOP/s, the data sheet's for dense bf16"
    return result["product"].get(tp) or float("nan"), "the student's logits as a product alone"


def share(result: dict, row: dict) -> float:
    """Part of the limit that the products which the task needs take place at."""
    return row["flops_per_second"] / row["tp"] / limit(result, row["tp"])[0]


def without_gradients(row: dict) -> int | None:
    return None if row["extra_bytes"] is None else row["extra_bytes"] - row["gradient_bytes"]


def find(result: dict, contender: str, tp: int, head: str) -> dict | None:
    """A measured row."""
    for row in result["rows"]:
        same = (row["contender"], row["tp"], row["head"]) == (contender, tp, head)
        if same and "seconds" in row:
            return row
    return None


def ratio(row: dict, other: dict | None, key: str) -> str:
    if other is None or row[key] is None or not other[key]:
        return "-"
    return f"{row[key] / other[key]:.3f}"


def aims(result: dict) -> list[dict]:
    """What was aimed at and what came out; ``met`` is None where it was not measured."""
    options, checked = result["options"], []

    def aim(text: str, got: float | None, limit: float, above: bool = False):
        met = None if got is None else (got >= limit if above else got <= limit)
        checked.append(dict(aim=text, got=got, limit=limit, met=met))

    def quotient(ours, other, key):
        if ours is None or other is None or ours[key] is None or not other[key]:
            return None
        return ours[key] / other[key]

    for tp in options["tp"]:
        for head in options["head"]:
            where = f"TP {tp}, head {head}"
            ours, naive = find(result, "ours", tp, head), find(result, "naive", tp, head)
            aim(f"{where}: memory / naive's", quotient(ours, naive, "extra_bytes"), 0.1)
            if head == "trained":
                beyond = [row and without_gradients(row) for row in (ours, naive)]
                got = None if None in beyond or not beyond[1] else beyond[0] / beyond[1]
                aim(f"{where}: the same, without the gradients", got, 0.1)
            liger = [find(result, n, tp, head) for n in CONTENDERS if n.startswith("liger")]
            liger = [row for row in liger if row and row["extra_bytes"]]
            if tp == 1:
                least = min(liger, key=lambda row: row["extra_bytes"], default=None)
                name = least["contender"] if least else "Liger"
                aim(f"{where}: memory / {name}'s", quotient(ours, least, "extra_bytes"), 1)
            if options["device"] == "cpu":
                aim(f"{where}: time / naive's", quotient(ours, naive, "seconds"), 1)
                aim(f"{where}: CPU time / naive's", quotient(ours, naive, "cpu_seconds"), 1)
            peak = result["peak_flops_per_second"]
            got = share(result, ours) if ours and peak else None
            aim(f"{where}: share of the GPU's peak product rate", got, 0.6, above=True)
            for name in ("ours-torch", "ours-compiled"):
                other = find(result, name, tp, head)
                if other:
                    aim(f"{where}: time / {name}'s", quotient(ours, other, "seconds"), 1)
                if other and peak:
                    aim(f"{where}: the same share, {name}", share(result, other), 0.6, above=True)
    return checked


def report(result: dict) -> str:
    o = result["options"]
    rates = ", ".join(
        f"TP {tp} {rate / 1e9:,.1f} GFLOP/s a rank"
        for tp, rate in result["product"].items()
        if rate
    )
    lines = [
        f"{result['command']}",
        f"{result['machine']}; "
        + ", ".join(f"{k} {v or 'not installed'}" for k, v in result["versions"].items()),
        f"t {o['tokens']:,}, h {o['hidden']:,}, h_t {o['teacher_hidden']:,}, v {o['vocab']:,}, "
        f"{o['dtype']}, {o['kind']}, T {o['temperature']:g}, a {o['alpha']:g}, b {o['beta']:g}, "
        f"k {o['topk']}; medians of {o['repeats']} alternating repetitions",
        f"The student's logits as a product alone: {rates or 'not measured'}",
        "", *table(result), "", "Aims, for 'ours, fused':",
    ]  # fmt: skip
    for checked in result["aims"]:
        got = "not measured" if checked["got"] is None else f"{checked['got']:.3f}"
        verdict = {None: "-", True: "met", False: "MISSED"}[checked["met"]]
        lines.append(f"  {checked['aim']:<62}{got:>13}  aim {checked['limit']:g}  {verdict}")
    return "\n".join(lines)


def draw(result: dict, path: str) -> None:
    """Four panels: time and memory against tokens and against the vocabulary."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    colour = dict(zip(CONTENDERS, COLOURS, strict=True))
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    names = list(dict.fromkeys(point["contender"] for point in result["sweep"]))
    for column, axis in enumerate(("tokens", "vocab")):
        points = [point for point in result["sweep"] if point["axis"] == axis]
        other = "vocab" if axis == "tokens" else "tokens"
        for row, key in enumerate(("seconds", "extra_bytes")):
            panel = panels[row][column]
            for name in names:
                xs = [p[axis] for p in points if p["contender"] == name]
                ys = [p[key] for p in points if p["contender"] == name]
                if None in ys:
                    continue
                ys = [1e3 * y for y in ys] if key == "seconds" else [max(y / MIB, 1) for y in ys]
                style = "-" if name.startswith("ours") else "--"
                panel.plot(
                    xs, ys, style, marker="o", markersize=4, label=CONTENDERS[name].title,
                    linewidth=2.5 if name == "ours" else 1.3,
                    color=colour[name],
                )  # fmt: skip
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:,g}")
            panel.yaxis.set_minor_locator(ticker.NullLocator())
            ticks = sorted({p[axis] for p in points})
            panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            fixed = f"{points[0][other]:,} {'ids' if other == 'vocab' else 'tokens'}"
            panel.set_title(f"{'Time' if row == 0 else 'Peak extra memory'}, {fixed}")
            panel.set_ylabel("ms, forward and backward" if row == 0 else "MiB beyond the inputs")
            panel.set_xlabel("tokens" if axis == "tokens" else "vocabulary ids")
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
    lines, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=5, fontsize=8)
    o = result["options"]
    figure.suptitle(
        f"Distillation loss, head frozen, TP 1, h {o['hidden']:,}, h_t {o['teacher_hidden']:,}, "
        f"{o['dtype']}\n{result['machine']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
