"""Preference of one answer to another: the keys of ``objective.preference``."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_moe_inject.recipe.schedule import Schedule

REFERENCES = ("original", "teacher")
CLASS = "preference"
"""The name of pairs among the classes of data, as in ``mixing: {preference: 0.25}``."""


@dataclass
class Preference:
    """Direct preference optimisation (DPO) on pairs of answers, beside all other terms.

    Attributes:
        data: entries of the training blend that hold pairs, made by ``moe-inject prepare-pairs``;
            each a 0-based position or a path prefix exactly as written there.
        beta: how strongly the student is held to the reference, above 0.
        reference: the model that a preference is measured against: ``original``, the student as it
            was when the injection began, or ``teacher``.
        teacher: with ``reference: teacher``, the key of ``teachers``; None = the only one.
        coeff: weight of the mean over the pairs of a batch.
        length_normalised: take the log-probability of an answer for each of its tokens, instead of
            their sum.
        label_smoothing: share of pairs taken to be labelled the wrong way round, below 0.5.
        sft: weight of the cross-entropy of preferred answers, a mean over the tokens of each and
            over the pairs, beside ``coeff``.
    """

    data: list[int | str] = field(
        metadata={"remedy": "name the blend entries that hold pairs, such as data: [2]"}
    )
    beta: float = 0.1
    reference: str = field(default="original", metadata={"choices": REFERENCES})
    teacher: str | None = None
    coeff: float | Schedule = 1.0
    length_normalised: bool = False
    label_smoothing: float = 0.0
    sft: float | Schedule = 0.0


def measured_by_original(pairs: Preference | None) -> bool:
    """Whether there are pairs that the original model is the reference of."""
    return pairs is not None and pairs.reference == "original"
