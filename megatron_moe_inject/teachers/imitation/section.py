"""The part of a recipe that imitates teachers' layers."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_moe_inject.losses.kinds import FEATURE_LOSSES
from megatron_moe_inject.recipe.schedule import Schedule, ever_positive
from megatron_moe_inject.recipe.section import Section


@dataclass
class Imitation:
    """Imitation of a teacher's layers on domain tokens, beside its predictions.

    Where the widths differ, a trainable linear projection leads to the teacher's.

    Attributes:
        hidden: weight of the student's hidden states after the layers of ``TeacherSpec.layers``.
        experts: weight of the combined output of the domain's chosen experts in those layers, on
            the tokens that reach one of them.
        loss: ``mse``, ``cosine`` or ``normalized``, as in ``losses.features``; a term is its mean
            over the layers.
    """

    hidden: float | Schedule = 0.0
    experts: float | Schedule = 0.0
    loss: str = field(default="normalized", metadata={"choices": FEATURE_LOSSES})

    def in_use(self) -> list[str]:
        """Names of the terms whose weight is ever above 0."""
        return [name for name in ("hidden", "experts") if ever_positive(getattr(self, name))]


IMITATION: Section[Imitation] = Section(
    "imitation", Imitation, Imitation, "Imitation of the teachers' layers, see Imitation."
)
