"""What was measured of held-out pairs: log-probabilities of every answer, and what follows.

Shapes: P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_moe_inject.losses.preference import PreferenceSpec, preference_loss
from megatron_moe_inject.preference import terms

ORIGINAL = "original"


@dataclass(frozen=True)
class MeasuredPairs:
    """Log-probabilities of P pairs, float64 ``[P, 2]``, chosen before rejected.

    Attributes:
        hashes: of each pair.
        log_probs: by the student, sums over an answer's tokens.
        tokens: of each answer.
        spec: which loss.
        against: what the reference is, ``original`` or a teacher's name; ``None`` without one.
        reference: log-probabilities by that.
        data: entries that they are of.
    """

    hashes: tuple[str, ...]
    log_probs: torch.Tensor
    tokens: torch.Tensor
    spec: PreferenceSpec
    against: str | None = None
    reference: torch.Tensor | None = None
    data: tuple[str, ...] = ()

    def values(self) -> dict[str, torch.Tensor]:
        """Values of each pair by the name of the term, ``[P]``: log-probabilities and what follows
        from them, and with a reference loss, accuracy, margin and rewards."""
        log_probs, tokens = self.log_probs, self.tokens
        if self.reference is None:
            told = terms.of_sides(terms.LOG_PROB, log_probs)
        else:
            of_pairs = preference_loss(log_probs, self.reference, tokens, self.spec)
            told = terms.by_name(of_pairs, log_probs)
            told |= terms.of_sides(terms.REFERENCE, self.reference)
        return told | terms.rankings(log_probs, tokens)

    def means(self) -> dict[str, float]:
        """Means over the pairs."""
        return {name: float(value.mean()) for name, value in self.values().items()}

    def summary(self) -> dict[str, float]:
        """The means by plain names, and the number of pairs."""
        return {"pairs": len(self.hashes)} | {
            name.removeprefix("preference ").replace(" ", "_").replace("/", "_"): mean
            for name, mean in self.means().items()
        }

    def sums(self) -> dict[str, list[float]]:
        """What it was measured as, by plain names."""
        of_both = {"log_prob": self.log_probs, "tokens": self.tokens}
        if self.reference is not None:
            of_both["reference_log_prob"] = self.reference
        return {
            f"{name}_{side}": values[:, i].tolist()
            for name, values in of_both.items()
            for i, side in enumerate(terms.SIDES)
        }

    @classmethod
    def of_sums(cls, sums: Mapping[str, list[float]], **fields: Any) -> MeasuredPairs:
        """From what ``sums`` gave, and the other fields."""

        def both(name: str) -> torch.Tensor:
            sides = [sums[f"{name}_{side}"] for side in terms.SIDES]
            return torch.tensor(sides, dtype=torch.float64).view(2, -1).t()

        known = f"reference_log_prob_{terms.SIDES[0]}" in sums
        reference = both("reference_log_prob") if known else None
        return cls(log_probs=both("log_prob"), tokens=both("tokens"), reference=reference, **fields)

    def beside(self, against: str | None, reference: torch.Tensor | None) -> MeasuredPairs:
        """The same with another reference, or none."""
        return replace(self, against=against, reference=reference)

    def in_order(self) -> MeasuredPairs:
        """By rising hash, and with the ten digits that a file keeps."""
        order = sorted(range(len(self.hashes)), key=lambda i: self.hashes[i])
        rows = torch.tensor(order, dtype=torch.int64)

        def kept(values: torch.Tensor) -> torch.Tensor:
            rounded = [[float(f"{x:.10g}") for x in pair] for pair in values[rows].tolist()]
            return torch.tensor(rounded, dtype=torch.float64).view(-1, 2)

        return replace(
            self,
            hashes=tuple(self.hashes[i] for i in order),
            log_probs=kept(self.log_probs),
            tokens=kept(self.tokens),
            reference=None if self.reference is None else kept(self.reference),
        )
