"""The part of a recipe that measures gain and forgetting while training."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe_inject.recipe.section import Section


@dataclass
class EvaluationSpec:
    """Measurement of gain and forgetting while training, on the same held-out text each time, and
    the run's list for ``moe-inject report``.

    Attributes:
        file: where the measurements go, one JSON line each; None =
            ``<save>/inject_evaluation.jsonl``.
        gate: stop before the first step when a teacher predicts the held-out text of one of its
            domains no better than the student does.
    """

    file: str | None = None
    gate: bool = True


EVALUATION: Section[EvaluationSpec | None] = Section(
    "evaluation",
    EvaluationSpec | None,
    lambda: None,
    "Measurement while training, see EvaluationSpec; null = Megatron's own evaluation alone.",
)
