"""Two evaluations of the same text side by side: what was gained, what was lost, how surely.

A Markdown table with a row for each class and number. Differences carry a 95 % paired bootstrap
interval (``bootstrap``); the share of the teacher's lead that was taken over is that of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megatron_moe_inject.evaluation.bootstrap import Interval, paired_difference
from megatron_moe_inject.evaluation.evaluation import (
    PARTLY,
    TAUGHT,
    ClassEvaluation,
    Evaluation,
    same_text,
)
from megatron_moe_inject.evaluation.pair_rows import pair_changes

_HEADER = ("class", "", "before", "after", "teacher", "change (95 % interval)", "of the lead")


def compare(before: Evaluation, after: Evaluation, names: tuple[str, str]) -> str:
    """The comparison as Markdown text.

    Args:
        names: what messages call the two, such as their files.

    Raises:
        RecipeError: they are not of the same text; the message says what differs.
    """
    rows, notes = comparison(before, after, names)
    return "\n".join([*_markdown(rows), "", *notes])


def comparison(
    before: Evaluation, after: Evaluation, names: tuple[str, str]
) -> tuple[list[Sequence[str]], list[str]]:
    """Rows of cells, the header first, and notes; arguments and errors are those of ``compare``."""
    same_text(before, after, names)
    rows: list[Sequence[str]] = [_HEADER]
    for name, ours in before.classes.items():
        rows += _class_rows(name, ours, after.classes[name])
    notes = []
    if before.pairs is not None and after.pairs is not None:
        changes, against = pair_changes(before.pairs, after.pairs)
        for i, row in enumerate(changes):
            named = "pairs" if i == 0 else "", row.name.removeprefix("preference ")
            numbers = map(_number, (row.before, row.after, row.teacher))
            rows.append((*named, *numbers, show_interval(row.change), ""))
        notes.append(against)
    for number, (name, evaluation) in enumerate(zip(names, (before, after), strict=True)):
        provenance = evaluation.provenance
        title = ("Before", "After")[number]
        notes.append(
            f"{title}: {name} (iteration {provenance.iteration}, --load "
            f"{provenance.checkpoint or 'nothing'})."
        )
    counts = ", ".join(
        f"{name} {len(results.sequences)} sequences, {int(results.sums['tokens'].sum()):,} tokens"
        for name, results in before.classes.items()
    )
    notes.append(f"Text: {counts}. Loss and KL in nats per token; less is better.")
    if not any("bytes" in results.sums for results in before.classes.values()):
        notes.append("No bits per byte: a tokenizer without text (NullTokenizer) measured them.")
    return rows, notes


def lead_taken_over(before: ClassEvaluation, after: ClassEvaluation) -> float | None:
    """Share of the teacher's lead in loss that the student has taken over; None where the teacher
    was not measured or had no lead."""
    source = after if "teacher_loss" in after.sums else before
    start, end = (_beside_teacher(results) for results in (before, after))
    teacher = source.mean("teacher_loss")
    if teacher is None or start is None or end is None or teacher >= start:
        return None
    return (start - end) / (start - teacher)


def _beside_teacher(found: ClassEvaluation) -> float | None:
    """The student's loss per token where its teacher can be asked."""
    loss, tokens = found.loss_beside_teacher()
    return float(loss.sum() / tokens.sum()) if tokens.sum() else None


def _class_rows(name: str, before: ClassEvaluation, after: ClassEvaluation) -> list[Sequence[str]]:
    if not before.sums["tokens"].sum():
        return [(name, "no tokens", "", "", "", "", "")]
    share = lead_taken_over(before, after)
    taken = "" if share is None else f"{100 * share:.0f} %"
    source = after if "teacher_loss" in after.sums else before
    rows = [
        _row("loss", "loss", before, after, source.mean("teacher_loss"), taken),
        (
            "perplexity",
            *(_number(results.summary()["perplexity"], 3) for results in (before, after)),
            _number(_exp(source.mean("teacher_loss")), 3),
            "",
            "",
        ),
    ]
    if all("bytes" in side.sums and side.sums["bytes"].sum() for side in (before, after)):
        bits = source.mean("teacher_loss", "bytes")
        teacher = None if bits is None else bits / math.log(2)
        rows.append(_row("bits per byte", "loss", before, after, teacher, "", per="bytes"))
    rows.append(_row("top-1 accuracy", "correct", before, after, None, ""))
    first, last = before.calibration_error(), after.calibration_error()
    assert first is not None, "there are tokens"
    assert last is not None, "they are the same"
    change = f"{last - first:+.4f}"
    rows.append(("calibration error", _number(first), _number(last), "", change, ""))
    for title, key in (
        ("KL to the teacher", "teacher_kl"),
        ("agreement with the teacher", "agreement"),
        ("KL to the original", "original_kl"),
    ):
        partly = key in TAUGHT and PARTLY[0] in before.sums
        per = PARTLY[0] if partly else "tokens"
        if key in before.sums and key in after.sums and before.sums[per].sum():
            rows.append(_row(title, key, before, after, None, "", per=per))
    return [(name if i == 0 else "", *row) for i, row in enumerate(rows)]


def _row(
    title: str,
    key: str,
    before: ClassEvaluation,
    after: ClassEvaluation,
    teacher: float | None,
    taken: str,
    per: str = "tokens",
) -> Sequence[str]:
    scale = 1 / math.log(2) if per == "bytes" else 1.0
    weights = before.sums[per]
    interval = paired_difference(scale * before.sums[key], scale * after.sums[key], weights)
    values = [scale * side.measured(key, per) for side in (before, after)]
    return (title, *map(_number, values), _number(teacher), show_interval(interval), taken)


def show_interval(found: Interval) -> str:
    """``-0.257 [-0.280, -0.233]``."""
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _exp(value: float | None) -> float | None:
    return None if value is None else float(np.exp(min(value, 700.0)))


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _markdown(rows: list[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("| " + " | ".join(cells) + " |")
        if number == 0:
            rule = ["-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
            lines.append("| " + " | ".join(rule) + " |")
    return lines
