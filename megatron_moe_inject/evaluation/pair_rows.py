"""Two measurements of the same pairs of answers side by side.

What a reference tells is of one: that of the evaluations, of both if only one of them has it, as a
run alone has no original model. Where neither has any, it is the student before, so that the table
says what training has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megatron_moe_inject.evaluation.bootstrap import Interval, paired_difference

if TYPE_CHECKING:
    from megatron_moe_inject.preference.measured_pairs import MeasuredPairs


class PairChange(NamedTuple):
    """A number of pairs: its term, the means before and after, that of a teacher that is the
    reference, and the change."""

    name: str
    before: float
    after: float
    teacher: float | None
    change: Interval


def pair_changes(before: MeasuredPairs, after: MeasuredPairs) -> tuple[list[PairChange], str]:
    """What has changed; and a sentence on what it is measured against."""
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
        first, last = sides
        change = paired_difference(first, last, np.ones(len(first)))
        means = float(first.mean()), float(last.mean())
        rows.append(PairChange(name, *means, of_teacher.get(name), change))
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
        return before.beside(None, None), after.beside(None, None), None
    if not having:
        start = "Before", before.log_probs
        return before.beside(*start), after.beside(*start), "Before"
    known = having[0].against, having[0].reference
    sides = [side if side.against else side.beside(*known) for side in (before, after)]
    return sides[0], sides[1], having[0].against
