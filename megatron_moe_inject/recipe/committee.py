"""The teachers of a domain: one, or a committee with weights; what it may be, and in words."""

from __future__ import annotations


def weights_of(teacher: str | dict[str, float] | None) -> dict[str, float]:
    """Weight of each teacher, summing to 1; empty without a teacher."""
    if not isinstance(teacher, dict):
        return {} if teacher is None else {teacher: 1.0}
    total = sum(teacher.values())
    return {name: weight / total for name, weight in teacher.items()}


def in_words(weights: dict[str, float], committee: str) -> str | None:
    """A domain's teacher, or ``0.7 coder + 0.3 prose``; ``by label(...)`` if weighed by token."""
    if len(weights) < 2:
        return next(iter(weights), None)
    text = " + ".join(f"{weight:.3g} {name}" for name, weight in weights.items())
    return text if committee == "fixed" else f"by {committee}({text})"
