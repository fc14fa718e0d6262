"""Two measurements of the same pairs of answers side by side.

What a reference tells is of one reference: that of the evaluations, if only one of them has it (as a
run alone has no original model) of both. Where neither has any, it is the student before, so that
the table says what training has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from megatron_moe_inject.evaluation.bootstrap import Interval, paired_difference

if TYPE_CHECKING:
    from megatron_moe_inject.preference.measured_pairs import MeasuredPairs


def pair_changes(
    before: MeasuredPairs, after: MeasuredPairs
) -> tuple[list[tuple[str, float, float, float | None, Interval]], str]:
    """Of each number its name, the means before and after, that of a teacher that is the reference,
    and the change over the pairs; and a sentence on what they are measured against."""
    from megatron_moe_inject.preference import terms
    from megatron_moe_inject.preference.measured_pairs import ORIGINAL

    before, after, against = _beside(before, after)
    ours, theirs = before.values(), after.values()
    of_teacher = {}
    if against not in (None, ORIGINAL) and after.against == against:
        of_teacher = {
            name.replace(terms.REFERENCE, terms.LOG_PROB): float(values.mean())
            for name, values in theirs.items()
            if name.startswith(terms.REFERENCE)
        }
    rows = []
    for name in ours:
        if name not in theirs or name.startswith(terms.REFERENCE):
            continue
        sides = [values[name].numpy() for values in (ours, theirs)]
        means = [float(values.mean()) for values in sides]
        change = paired_difference(*sides, np.ones(len(sides[0])))
        rows.append((name, *means, of_teacher.get(name), change))
    beta = f"beta {after.spec.beta:g}{', per token' if after.spec.length_normalised else ''}"
    if against is None:
        what = "the evaluations have other references, so that loss and rewards are left out"
    else:
        what = f"loss and rewards against {against}, {beta}"
    return rows, f"Pairs of answers: {len(after.hashes)}; {what}. Log-probabilities in nats."


def _beside(
    before: MeasuredPairs, after: MeasuredPairs
) -> tuple[MeasuredPairs, MeasuredPairs, str | None]:
    """Both with one reference and one loss, and its name; without one where they have others."""
    before = replace(before, spec=after.spec)
    having: Sequence[MeasuredPairs] = [side for side in (after, before) if side.against is not None]
    if len({side.against for side in having}) > 1:
        nothing = {"against": None, "reference": None}
        return replace(before, **nothing), replace(after, **nothing), None
    if not having:
        start = {"against": "Before", "reference": before.log_probs}
        return replace(before, **start), replace(after, **start), "Before"
    known = {"against": having[0].against, "reference": having[0].reference}
    sides = [side if side.against else replace(side, **known) for side in (before, after)]
    return sides[0], sides[1], having[0].against
